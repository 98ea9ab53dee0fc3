"""From XLA to torch: how a call is lowered, what XLA runs, on which thread.

It may import `calls` and what is below. Start at `lowering.py`; `program.py` is what XLA calls.
"""
