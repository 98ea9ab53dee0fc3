"""JAX functions as differentiable torch functions over flat tensors: the other direction of `calls`.

It may import `values`, `process`, `errors` and `internals`. Start at `bind.py`, the autograd function; `call.py` has
what is computed and `kernel.py` how tensors become arrays and arrays tensors.
"""
