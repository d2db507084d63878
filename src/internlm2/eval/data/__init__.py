"""The data of the benchmarks: where the files lie, whether they are the right ones, and how to get them there."""
