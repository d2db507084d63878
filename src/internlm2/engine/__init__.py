"""Inference: sampling, caches, the generation loop, and models that take text."""
