"""Weights in torch's terms, of a `TorchModule` of any framework: state dicts and plain torch modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ...interop.values.arrays import array_to_torch, leaves_to_jax
from .functional_module import FunctionalModule
from .skeleton import named_tensors


@dataclass(frozen=True)
class Held:
    """The weights of a `TorchModule`, wherever its framework keeps them."""

    module: FunctionalModule
    weights: dict[str, Any]
    """torch name to array."""
    training: bool
    replace: Callable[[dict[str, jax.Array], FunctionalModule], Any]
    """What the user gets when all weights are replaced, and the module: a new model, or its new variables."""


@singledispatch
def held(model: Any, state: Any) -> Held:
    """The weights of a model, with what its framework keeps outside of it. Each framework registers its own."""
    raise TypeError(
        f"model must be a torchleaf TorchModule, got {type(model).__name__}. Pass the TorchModule inside it, e.g. "
        "`model.encoder`."
    )


def state_dict(model: Any, state: Any = None) -> dict[str, Any]:
    """The current weights as a torch state dict, ready for `torch.save` and `module.load_state_dict`.

    **Arguments:**

    - `model`: a `TorchModule` of Equinox, Linen or NNX.
    - `state`: what the framework keeps outside of the model: for Equinox the `eqx.nn.State`, if the model was made by
      `eqx.nn.make_with_state`; for Linen the module's variables; nothing for NNX and for bound Linen modules.

    **Returns:** torch name to tensor, in torch's order and dtypes; tied weights under each of their names. The tensors
    are views of the leaves (64-bit dtypes excepted, without x64): do not write into them. Where the module has extra
    state (`get_extra_state`), that is there, too.

    **Raises:** `TypeError` if `model` is no `TorchModule` or is being traced.
    """
    source = held(model, state)
    return {name: entry for name, (entry, _) in _entries(source).items()}


def load_state_dict(model: Any, state_dict: Mapping[str, Any], state: Any = None, *, copy: bool = False) -> Any:
    """A model with the weights of a torch state dict.

    **Arguments:**

    - `model`: a `TorchModule` of Equinox, Linen or NNX. Those of Equinox and Linen stay as they are.
    - `state_dict`: torch name to tensor, as `module.state_dict()` gives it. Values are cast to each weight's dtype.
    - `state`: as in `torchleaf.state_dict`.
    - `copy`: copy the tensors; otherwise leaves are views of them where dtype and layout allow.

    **Returns:** for Equinox a new `TorchModule`, with `state` a tuple of it and the new state; for Linen new variables;
    for NNX the model itself, changed in place.

    **Raises:** `KeyError` naming missing and unexpected entries; `ValueError` naming an entry of another shape.
    """
    source = held(model, state)
    module, names = source.module, {name: leaf for name, (_, leaf) in _entries(source).items()}
    missing, unexpected = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unexpected:
        raise KeyError(
            f"load_state_dict: the state dict does not fit {module.name}: missing {missing}, unexpected {unexpected}. "
            "Rename or drop entries, or start from `torchleaf.state_dict(model)`."
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, leaf in names.items():
        if leaf is None:
            continue
        spec, tensor = module.specs[leaf], state_dict[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(
                f"load_state_dict: {name!r} has shape {tuple(tensor.shape)}, but {module.name} has {spec.shape}."
            )
        tensors[leaf] = tensor.detach().to(spec.dtype)
    weights = {**source.weights, **leaves_to_jax(tensors, copy=copy)}
    if None in names.values():
        module = _with_extra_state(source, weights, state_dict)
    return source.replace(weights, module)


def to_torch_module(model: Any, state: Any = None, *, copy: bool = True) -> torch.nn.Module:
    """A plain `torch.nn.Module` carrying the current weights, independent of JAX.

    **Arguments:**

    - `model`: a `TorchModule` of Equinox, Linen or NNX.
    - `state`: as in `torchleaf.state_dict`.
    - `copy`: with False the parameters are views of the leaves, and training the torch module writes into JAX's
      arrays; only for modules that are not updated in place.

    **Returns:** a copy of the wrapped module, `requires_grad` and ties as in the original, in training or evaluation
    mode as the model is.
    """
    source = held(model, state)
    return source.module.with_weights(_tensors(source.module, source.weights, copy=copy), training=source.training)


def _entries(source: Held) -> dict[str, tuple[Any, str | None]]:
    """What torch's state dict has, each with the leaf behind it; None for what is no weight."""
    module, tensors = source.module, _tensors(source.module, source.weights, copy=False)
    has_more = any(
        type(part).get_extra_state is not torch.nn.Module.get_extra_state for part in module.skeleton.modules()
    )
    # What a module has to say beside its weights, it may compute from them.
    plain = module.with_weights(tensors, training=source.training) if has_more else module.skeleton
    leaf_of = {id(tensor): name for name, tensor in named_tensors(plain)}
    found = {name: (x, leaf_of.get(id(x))) for name, x in plain.state_dict(keep_vars=True).items()}
    if not has_more:
        found = {name: entry for name, entry in found.items() if entry[1] is not None}
    return {name: (x if leaf is None else tensors[leaf], leaf) for name, (x, leaf) in found.items()}


def _with_extra_state(
    source: Held, weights: Mapping[str, jax.Array], state_dict: Mapping[str, Any]
) -> FunctionalModule:
    """The module after torch has loaded a state dict."""
    tensors = _tensors(source.module, weights, copy=True)
    plain = source.module.with_weights(tensors, training=source.module.training)
    plain.load_state_dict(state_dict)
    return source.module.of_module(plain)


def _tensors(module: FunctionalModule, weights: Mapping[str, Any], *, copy: bool) -> dict[str, torch.Tensor]:
    return {
        name: array_to_torch(_array(leaf), copy=copy, name=name).to(module.specs[name].dtype)
        for name, leaf in weights.items()
    }


def _array(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf  # as flax.serialization restores weights
