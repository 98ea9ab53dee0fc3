"""The algebra of calls: a callable over flat tensors, its derivatives and batches, and how each is carried out.

It may import `replay` and what is below. Start at `call.py`, which lists the kinds; then `plan.py` and `proof.py`.
"""
