"""The engine that tests run with which choose none: see `both_engines` in conftest.py."""

from torchleaf.interop import function
from torchleaf.interop.types import CallOptions


def choose_xla(monkeypatch):
    """`engine="xla"` is the default, but for single ops that are left to torch."""
    check, single_op = CallOptions.__post_init__, function._single_op
    is_single = False

    def chosen(self):
        if not is_single:
            object.__setattr__(self, "engine", "xla")
        check(self)

    def carried(*args):
        nonlocal is_single
        is_single = True
        try:
            return single_op(*args)
        finally:
            is_single = False

    monkeypatch.setattr(CallOptions, "__post_init__", chosen)
    monkeypatch.setattr(function, "_single_op", carried)
