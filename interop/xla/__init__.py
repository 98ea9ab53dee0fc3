"""The second engine: a torch callable written down as a graph of ATen ops once, which JAX computes.

It may import `tracing` and what is below; nothing of it imports JAX's functions for ops before the engine is chosen.
Start at `specialize.py`, which is asked by `function.py`.
"""
