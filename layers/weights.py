"""Weights in torch's terms: state dicts, plain torch modules, stacked ensembles, what an optimizer trains."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
from jaxtyping import PyTree

from ..interop.arrays import array_to_torch, tensor_to_jax
from .equinox import TorchModule

Model = TypeVar("Model")


def trainable(model: PyTree) -> PyTree:
    """The filter spec of what an optimizer should train.

    ```python
    params, static = eqx.partition(model, torchleaf.trainable(model))
    opt_state = optimizer.init(params)
    ```

    **Arguments:** `model`: any pytree, such as an Equinox model that holds `TorchModule`s.

    **Returns:** a pytree of the same structure: True for the `params` of each `TorchModule` and for every other
    floating or complex array, False for torch's frozen parameters and buffers and for everything else.
    """

    def spec(node: Any) -> Any:
        if isinstance(node, TorchModule):
            return jax.tree_util.tree_map_with_path(lambda path, leaf: path[0].name == "params", node)
        return eqx.is_inexact_array(node)

    return jax.tree.map(spec, model, is_leaf=_is_torch_module)


def state_dict(model: TorchModule, state: eqx.nn.State | None = None) -> dict[str, torch.Tensor]:
    """The current weights as a torch state dict, ready for `torch.save` and `module.load_state_dict`.

    **Arguments:**

    - `model`: a `TorchModule`.
    - `state`: the `eqx.nn.State` with its buffers, if it was made by `eqx.nn.make_with_state`.

    **Returns:** torch name to tensor, in torch's order and dtypes; tied weights under each of their names. The tensors
    are views of the leaves (64-bit dtypes excepted, without x64): do not write into them.

    **Raises:** `TypeError` if `model` is no `TorchModule` or is being traced.
    """
    _check_model("state_dict", model)
    tensors = _tensors(model, state, copy=False)
    return {name: tensors[leaf] for name, leaf in model.module.state_names().items()}


@overload
def load_state_dict(
    model: TorchModule, state_dict: Mapping[str, torch.Tensor], state: None = None, *, copy: bool = False
) -> TorchModule: ...


@overload
def load_state_dict(
    model: TorchModule, state_dict: Mapping[str, torch.Tensor], state: eqx.nn.State, *, copy: bool = False
) -> tuple[TorchModule, eqx.nn.State]: ...


def load_state_dict(
    model: TorchModule,
    state_dict: Mapping[str, torch.Tensor],
    state: eqx.nn.State | None = None,
    *,
    copy: bool = False,
) -> TorchModule | tuple[TorchModule, eqx.nn.State]:
    """A new model with the weights of a torch state dict.

    **Arguments:**

    - `model`: a `TorchModule`; it stays as it is.
    - `state_dict`: torch name to tensor, as `module.state_dict()` gives it. Values are cast to each weight's dtype.
    - `state`: the `eqx.nn.State` with the model's buffers, if it was made by `eqx.nn.make_with_state`.
    - `copy`: copy the tensors; otherwise leaves are views of them where dtype and layout allow.

    **Returns:** a `TorchModule`; with `state`, a tuple of it and the new state.

    **Raises:** `KeyError` naming missing and unexpected entries; `ValueError` naming an entry of another shape.
    """
    _check_model("load_state_dict", model)
    names = model.module.state_names()
    missing, unexpected = sorted(names.keys() - state_dict.keys()), sorted(state_dict.keys() - names.keys())
    if missing or unexpected:
        raise KeyError(
            f"load_state_dict: the state dict does not fit {model.module.name}: missing {missing}, unexpected "
            f"{unexpected}. Rename or drop entries, or start from `torchleaf.state_dict(model)`."
        )
    loaded: dict[str, jax.Array] = {}
    for name, leaf in names.items():
        spec, tensor = model.module.specs[leaf], state_dict[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(
                f"load_state_dict: {name!r} has shape {tuple(tensor.shape)}, but {model.module.name} has {spec.shape}."
            )
        loaded[leaf] = tensor_to_jax(tensor.detach().to(spec.dtype), copy=copy, name=name)

    def replaced(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: loaded.get(name, leaf) for name, leaf in weights.items()}

    buffers = replaced(model.buffers_in(state))
    model = eqx.tree_at(lambda m: (m.params, m.frozen), model, (replaced(model.params), replaced(model.frozen)))
    if state is not None:
        return model, model.with_buffers(state, buffers)
    return eqx.tree_at(lambda m: m.buffers, model, buffers)


def to_torch_module(model: TorchModule, state: eqx.nn.State | None = None, *, copy: bool = True) -> torch.nn.Module:
    """A plain `torch.nn.Module` carrying the current weights, independent of JAX.

    **Arguments:**

    - `model`: a `TorchModule`.
    - `state`: the `eqx.nn.State` with its buffers, if it was made by `eqx.nn.make_with_state`.
    - `copy`: with False the parameters are views of the leaves, and training the torch module writes into JAX's
      arrays; only for modules that are not updated in place.

    **Returns:** a copy of the wrapped module, `requires_grad` and ties as in the original, in evaluation mode if
    `model.inference`.
    """
    _check_model("to_torch_module", model)
    return model.module.with_weights(_tensors(model, state, copy=copy), training=not model.inference)


def stack(models: Sequence[Model]) -> Model:
    """One model with stacked leaves, for vmapped ensembles.

    ```python
    ensemble = torchleaf.stack([make() for _ in range(8)])
    ys = eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(ensemble, x)
    ```

    **Arguments:** `models`: pytrees of one structure, `TorchModule`s or models that hold them, whose torch modules are
    alike up to their weights.

    **Returns:** a pytree of the same structure whose arrays have a leading axis of `len(models)`.

    **Raises:** `ValueError` naming what differs.
    """
    if not models:
        raise ValueError("stack: models is empty; give at least one model.")
    flat = [jax.tree.flatten(m, is_leaf=_is_torch_module) for m in models]
    leaves, treedefs = zip(*flat, strict=True)
    for i, treedef in enumerate(treedefs):
        if treedef != treedefs[0]:
            raise ValueError(f"stack: models[{i}] has structure {treedef}, but models[0] has {treedefs[0]}.")
    return jax.tree.unflatten(treedefs[0], [_stack_leaf(column) for column in zip(*leaves, strict=True)])


def _stack_leaf(column: Sequence[Any]) -> Any:
    first = column[0]
    if isinstance(first, TorchModule):
        for i, other in enumerate(column):
            if not isinstance(other, TorchModule) or not first.module.same_structure(other.module):
                raise ValueError(
                    f"stack: the torch module of models[{i}] differs from that of models[0]: {other} and {first}."
                )
        # The treedefs differ by their skeletons alone; the first one stands for all.
        rows, treedef = zip(*(jax.tree.leaves(m) for m in column), strict=True), jax.tree.structure(first)
        return jax.tree.unflatten(treedef, [_stack_leaf(row) for row in rows])
    if eqx.is_array(first):
        shapes = {x.shape for x in column}
        if len(shapes) > 1:
            raise ValueError(f"stack: leaves of different shapes {sorted(shapes)} cannot be stacked.")
        return jnp.stack(column)
    if any(x != first for x in column):
        raise ValueError(f"stack: static leaves differ: {column}.")
    return first


def _tensors(model: TorchModule, state: eqx.nn.State | None, *, copy: bool) -> dict[str, torch.Tensor]:
    weights = {**model.params, **model.frozen, **model.buffers_in(state)}
    return {
        name: array_to_torch(leaf, copy=copy, name=name).to(model.module.specs[name].dtype)
        for name, leaf in weights.items()
    }


def _is_torch_module(node: Any) -> bool:
    return isinstance(node, TorchModule)


def _check_model(function: str, model: Any) -> None:
    if not isinstance(model, TorchModule):
        raise TypeError(
            f"{function}: model must be a torchleaf TorchModule, got {type(model).__name__}. Pass the TorchModule "
            "inside it, e.g. `model.encoder`."
        )
