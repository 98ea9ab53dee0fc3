"""What Equinox models that hold `TorchModule`s need: which leaves to train, stacked ensembles."""

from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

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
    _check_parts(models)
    leaves, treedefs = zip(*map(jax.tree.flatten, models), strict=True)
    for i, treedef in enumerate(treedefs):
        if treedef != treedefs[0]:
            raise ValueError(f"stack: models[{i}] has structure {treedef}, but models[0] has {treedefs[0]}.")
    return jax.tree.unflatten(treedefs[0], [_stack_leaf(column) for column in zip(*leaves, strict=True)])


def _stack_leaf(column: Sequence[Any]) -> Any:
    first = column[0]
    if eqx.is_array(first):
        shapes = {x.shape for x in column}
        if len(shapes) > 1:
            raise ValueError(f"stack: leaves of different shapes {sorted(shapes)} cannot be stacked.")
        return jnp.stack(column)
    if any(x != first for x in column):
        raise ValueError(f"stack: static leaves differ: {column}.")
    return first


def _check_parts(models: Sequence[Any]) -> None:
    """Say which torch modules differ, which the structures of whole models would say at length."""
    parts = [[x for x in jax.tree.leaves(m, is_leaf=_is_torch_module) if _is_torch_module(x)] for m in models]
    for i, others in enumerate(parts):
        for first, other in zip(parts[0], others, strict=False):
            if first.module != other.module:
                raise ValueError(
                    f"stack: the torch module of models[{i}] differs from that of models[0]: {other} and {first}."
                )


def _is_torch_module(node: Any) -> bool:
    return isinstance(node, TorchModule)
