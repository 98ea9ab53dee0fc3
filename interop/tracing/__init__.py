"""One signature of a callable: its arguments, a watched run, what was seen, and the call that comes of it.

It may import `calls` and what is below. Start at `trace.py`, which is asked by `function.py`.
"""
