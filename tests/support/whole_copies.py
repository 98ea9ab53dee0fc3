"""Modules whose forward goes through what `copy.deepcopy` does not copy, or whose weights are in odd places."""

import functools
import types
import weakref
from collections import deque
from typing import Any

import torch
from torch import nn


class Through(nn.Module):
    """Calls `self.f`, which its subclasses or the functions below set."""

    f: Any

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("shift", torch.rand(3))

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) + self.shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(x)


class Holder:
    """A plain object with attributes."""

    def __init__(self, **attributes: Any):
        vars(self).update(attributes)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        return self.module.layer(x)  # pyright: ignore[reportAttributeAccessIssue]


class Slotted:
    __slots__ = ("f",)

    def __init__(self, f: Any):
        self.f = f


def _module(f: Any) -> nn.Module:
    module = Through()
    module.f = f(module)
    return module


def _nested(self: Through) -> Any:
    def outer(x):
        def inner(y):
            return self.layer(y)

        return inner(x)

    return outer


def _recursive(self: Through) -> Any:
    def apply(x, depth=2):
        return self.layer(x) if depth == 0 else apply(self.layer(x), depth - 1)

    return apply


def _keyword_default(self: Through) -> Any:
    def apply(x, *, linear=self.linear):
        return linear(x)

    return apply


def _wrapped(self: Through) -> Any:
    @functools.wraps(self.layer)
    def apply(*args):
        return apply.__wrapped__(*args) * 2

    return apply


def _attribute_of_function(self: Through) -> Any:
    def apply(x):
        return apply.linear(x)

    apply.linear = self.linear
    return apply


def _container(self: Through) -> Any:
    table = {"f": [lambda x: self.linear(x)], "g": (deque([lambda x: x * self.shift]),)}
    return lambda x: table["g"][0][0](table["f"][0](x))


def _cached(self: Through) -> Any:
    @functools.lru_cache(maxsize=4)
    def scale(power):
        return self.linear.bias**power

    def apply(x):
        return x * scale(2)

    apply.forget = scale.cache_clear
    return apply


def _weak_closure(self: Through) -> Any:
    reference = weakref.ref(self)
    return lambda x: reference().layer(x)


def _builtin_partial(self: Through) -> Any:
    return functools.partial(torch.nn.functional.linear, weight=self.linear.weight)


def _method_of_object(self: Through) -> Any:
    return Holder(module=self).call


def _closure_as_method(self: Through) -> Any:
    return types.MethodType(lambda holder, x: self.linear(x) * holder.factor, Holder(factor=3.0))


def _in_a_slot(self: Through) -> Any:
    return functools.partial(lambda slotted, x: slotted.f(x), Slotted(self.layer))


def _shares_a_cell(self: Through) -> Any:
    linear = self.linear

    def turn(x):
        return linear(x)

    def back(x):
        return x @ linear.weight

    return lambda x: back(turn(x))


CLOSURES = {
    "lambda": lambda self: lambda x: torch.tanh(self.linear(x)),
    "submodule": lambda self: (lambda linear: lambda x: linear(x))(self.linear),
    "parameter": lambda self: (lambda w: lambda x: x @ w)(self.linear.weight),
    "buffer": lambda self: (lambda b: lambda x: self.linear(x) * b)(self.shift),
    "view of a parameter": lambda self: (lambda w: lambda x: x @ w)(self.linear.weight.t()),
    "default": lambda self: lambda x, linear=self.linear: linear(x),
    "keyword default": _keyword_default,
    "bound method": lambda self: self.layer,
    "partial": lambda self: functools.partial(type(self).layer, self),
    "partial of a lambda": lambda self: functools.partial(lambda scale, x: self.layer(x) * scale, 2.0),
    "partial of a builtin": _builtin_partial,
    "nested": _nested,
    "recursive": _recursive,
    "wrapped": _wrapped,
    "attribute of a function": _attribute_of_function,
    "containers": _container,
    "cached": _cached,
    "weak reference": _weak_closure,
    "method of an object": _method_of_object,
    "closure as method": _closure_as_method,
    "slot": _in_a_slot,
    "shared cell": _shares_a_cell,
}


def _patched(make: Any) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    linear = module[2]
    linear.forward = make(linear, linear.forward)
    return module


PATCHES = {
    "lambda": lambda linear, old: lambda x: old(x) * linear.bias,
    "method": lambda linear, old: types.MethodType(lambda self, x: old(x) + self.weight.sum(), linear),
    "partial": lambda linear, old: functools.update_wrapper(
        functools.partial(lambda self, x: old(x) @ self.weight, linear), old
    ),
}


def _hook(register: Any) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    register(module)
    return module


HOOKS = {
    "forward": lambda m: m[1].register_forward_hook(lambda part, args, output: output @ m[2].weight),
    "forward pre": lambda m: m[1].register_forward_pre_hook(lambda part, args: (args[0] * m[0].bias,)),
    "with keywords": lambda m: m[2].register_forward_hook(
        lambda part, args, kwargs, output: output * m[0].bias, with_kwargs=True
    ),
    "full backward": lambda m: m[1].register_full_backward_hook(lambda part, gi, go: (gi[0] * m[0].bias.detach(),)),
    "bound method": lambda m: m[1].register_forward_hook(Holder(m=m, scale=2.0).__class__.scaled.__get__(Holder(m=m))),
}


def _scaled(self: Any, part: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * self.m[0].bias


Holder.scaled = _scaled  # pyright: ignore[reportAttributeAccessIssue]


class Placed(nn.Module):
    """A parameter and a buffer, once more in an attribute."""

    def __init__(self, place: Any, read: Any):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("b", torch.rand(3))
        self.place = place(self)
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.read(self.place).reshape(-1)[:3] + self.b


def _named(self: Placed) -> Any:
    return _Pair(self.w, "constant")


class _Pair(tuple):
    __slots__ = ()

    def __new__(cls, *items: Any):
        return tuple.__new__(cls, items)

    def __reduce__(self) -> Any:
        return _Pair, tuple(self)


PLACES = {
    "list": (lambda m: [m.w], lambda p: p[0]),
    "dict": (lambda m: {"w": m.w}, lambda p: p["w"]),
    "tuple": (lambda m: (1, m.w, m.b), lambda p: p[1] * p[2].sum()),
    "nested": (lambda m: {"a": [(m.w, {"b": m.b})]}, lambda p: p["a"][0][0] + p["a"][0][1]["b"]),
    "object": (lambda m: Holder(w=m.w), lambda p: p.w),
    "slot": (lambda m: Slotted(m.w), lambda p: p.f),
    "deque": (lambda m: deque([m.w, m.b]), lambda p: p[0] * p[1]),
    "set": (lambda m: {m.w}, lambda p: next(iter(p))),
    "frozenset": (lambda m: frozenset([m.w]), lambda p: next(iter(p))),
    "key": (lambda m: {m.w: 2.0}, lambda p: next(k * v for k, v in p.items())),
    "buffer": (lambda m: [m.b], lambda p: p[0]),
    "module in a list": (lambda m: [Holder(inner=[m])], lambda p: p[0].inner[0].w),
    "method of a tuple's object": (lambda m: (Holder(module=m).reach,), lambda p: p[0]()),
    "data": (lambda m: m.w.data, lambda p: p),
    "transpose": (lambda m: m.w.t(), lambda p: p),
    "detached view": (lambda m: [m.w.detach()[1:, ::2]], lambda p: p[0].repeat(1, 2)),
    "row": (lambda m: {"row": m.w[1]}, lambda p: p["row"]),
    "expanded": (lambda m: m.w[0, 1].expand(3), lambda p: p),
    "of a buffer": (lambda m: m.b[1:], lambda p: p.repeat(2)),
}

Holder.reach = lambda self: self.module.w  # pyright: ignore[reportAttributeAccessIssue]


def closures() -> dict[str, Any]:
    """Makers of modules that compute through functions."""
    return {
        **{f"closure: {name}": functools.partial(_module, f) for name, f in CLOSURES.items()},
        **{f"patched forward: {name}": functools.partial(_patched, f) for name, f in PATCHES.items()},
        **{f"hook: {name}": functools.partial(_hook, f) for name, f in HOOKS.items()},
    }


def places() -> dict[str, Any]:
    """Makers of modules that have weights, or views of them, in attributes."""
    return {f"place: {name}": functools.partial(Placed, *case) for name, case in PLACES.items()}
