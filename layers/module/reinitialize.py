"""New initial weights, drawn from JAX keys: by JAX initialisers, or by torch's own `reset_parameters`."""

import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn.utils.parametrize import ParametrizationList

from ...interop.function import torch_function
from ...interop.values import dtypes
from .functional_module import FunctionalModule
from .skeleton import named_tensors

Initializer = Callable[..., Any]
"""A JAX initialiser: `(key, shape, dtype)` to array, possibly boxed with metadata."""


def reinitialize(
    module: FunctionalModule, initializer: Any, weights: dict[str, Any], make_key: Callable[[], Any]
) -> dict[str, Any]:
    """New values of those weights that an initialiser makes.

    `initializer` is `"reset_parameters"`, an `Initializer` of all trainable parameters, or pairs of a torch name or
    pattern and an `Initializer`, of which the first that fits a name counts.
    """
    trainable = [name for name, spec in module.specs.items() if spec.kind == "params"]
    if initializer == "reset_parameters":
        drawn = reset_parameters(module)(weights, key=make_key())
        return {name: x for name, x in drawn.items() if module.specs[name].kind != "frozen"}
    if isinstance(initializer, str) or not (callable(initializer) or isinstance(initializer, tuple)):
        raise TypeError(
            "initializer must be 'reset_parameters', a JAX initialiser (key, shape, dtype) or a dict of such by torch "
            f"name, got {initializer!r}."
        )
    pairs = initializer if isinstance(initializer, tuple) else (("*", initializer),)
    for pattern, _ in pairs:
        if not any(fnmatchcase(name, pattern) for name in trainable):
            raise ValueError(f"initializer: {pattern!r} fits none of the trainable parameters {trainable}.")
    fitting = {name: [f for pattern, f in pairs if fnmatchcase(name, pattern)] for name in trainable}
    return {
        name: found[0](make_key(), module.specs[name].shape, dtypes.canonical(module.specs[name].dtype))
        for name, found in fitting.items()
        if found
    }


def reset_parameters(module: FunctionalModule) -> Callable[..., dict[str, Any]]:
    """A JAX function `(weights, key=)` that gives the weights torch's layers start with, by torch name.

    It calls `reset_parameters` of every submodule that has one, inner ones first, as constructors do. Submodules whose
    own parameters are all frozen are left out, and what is left out keeps the value it has in `weights`.
    """
    left = list(_left_out(module))
    if left:
        warnings.warn(
            f"initializer='reset_parameters': no `reset_parameters` of {module.name} or its parts draws "
            f"{', '.join(f'`{name}`' for name in left)}, so every init gives torch's value. Give that part a method "
            "`reset_parameters`, or pass `initializer={name: (key, shape, dtype) -> array}`.",
            stacklevel=2,
        )

    def reset(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        plain = module.with_weights(weights, training=True)
        for part in reversed(list(plain.modules())):
            if _resets(part):
                _method_of(part)()
        return {name: tensor.detach() for name, tensor in named_tensors(plain)}

    reset.__qualname__ = f"{module.name}.reset_parameters"
    return torch_function(reset, vmap_method="loop")


def _method_of(part: torch.nn.Module) -> Any:
    return getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)


def _resets(part: torch.nn.Module) -> bool:
    own = list(part.parameters(recurse=False))
    return _method_of(part) is not None and (not own or any(p.requires_grad for p in own))


def _left_out(module: FunctionalModule) -> Iterator[str]:
    """Trainable parameters that no part resets: neither theirs nor one around it."""
    parts = dict(module.skeleton.named_modules(remove_duplicate=False))
    for name in (name for name, spec in module.specs.items() if spec.kind == "params"):
        path = name.split(".")[:-1]
        around = [parts[".".join(path[:n])] for n in range(len(path) + 1)]
        if isinstance(around[-1], ParametrizationList) or not any(map(_resets, around)):
            yield name
