"""Ops of a call written down at its first runs, and run again without its Python.

It may import `modes` and what is below. Start at `repeated.py`: when a call is recorded, proven and replayed.
"""
