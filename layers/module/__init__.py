"""A torch module as a function of its weights, for whatever framework: torch's side of the layers.

It may import `interop`, and no framework. Start at `functional_module.py`, the module taken apart; a call of one of its
methods is `module_function.py`.
"""
