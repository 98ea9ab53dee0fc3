"""JAX models as torch modules: their arrays as parameters and buffers, their state, modes and random numbers.

It may import `interop` and what tells trainable leaves of Equinox models; Flax is imported by those who use it.
Start at `module.py`; `kinds.py` has what a model must tell, and a file for each framework says it.
"""
