"""What there is once in a process: switches of torch that several threads hold, things that are made once.

It imports nothing of torchleaf. Start at `switches.py`.
"""
