"""Examine an installation and a model folder: what is wrong, what it causes, what mends it."""
