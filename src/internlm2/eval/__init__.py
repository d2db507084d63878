"""Scores with their protocol: the benchmarks of the InternLM2 model card, as they were run and as they should be."""
