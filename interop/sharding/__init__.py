"""Many devices: what of a call can be split over a mesh, the types of its results, how XLA partitions it.

It may import `transport`, `calls` and what is below. Start at `batches.py`; `partition.py` is what XLA asks.
"""
