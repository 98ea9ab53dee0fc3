"""What torch is made to do around a call: modes that see ops, kernels that are chosen, random numbers, fake runs.

It may import `values` and what is below. Start at `dispatch.py` for what sees every op, at `known.py` for fake runs.
"""
