"""What each ATen op is in JAX, one small function each, in rooms by subject.

It may import `table.py` and `dtypes.py` of the room above, and JAX. Start at `elementwise.py`; `table.py` loads all.
"""
