"""The only door to what torch and JAX keep to themselves: their modules and names with an underscore.

It may import nothing of the other rooms. Each name says what it stands for and what breaks without it, so that a new
release is tried here first. All of these are there in torch 2.11 to 2.15 and JAX 0.10 to 0.12. Start at `ops.py`.
"""
