"""JAX functions as differentiable torch functions over flat tensors: the other direction of `calls`.

It may import `values`, `process`, `errors` and `internals`. Start at `bind.py`, the autograd function; `call.py` has
what is computed, `kernel.py` how it runs, and `views.py` the arrays that tensors are.
"""
