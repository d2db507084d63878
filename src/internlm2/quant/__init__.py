"""Fewer bits: keys and values in int8, weights in int8 or int4."""
