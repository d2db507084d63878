"""The race against other engines: what `benchmarks/race.py` is made of."""
