"""Fewer bits: keys and values in int8."""
