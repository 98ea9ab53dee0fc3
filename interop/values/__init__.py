"""What crosses between JAX and torch: arrays, dtypes, pytrees and their classes, static values, memory.

It may import `errors` and `process`. Start at `arrays.py`, which views the memory of one as the other's.
"""
