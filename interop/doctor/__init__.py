"""`python -m torchleaf`: what is installed, and whether it works here.

It may import all of `interop`. Start at `doctor.py`.
"""
