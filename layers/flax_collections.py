"""What Linen and NNX share: where Flax users look for a torch weight, and how torch's dotted names nest."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer

from .module.functional_module import FunctionalModule, Kind

Collection = Literal["params", "frozen", "batch_stats", "buffers"]
"""Flax's name for a group of variables: a collection in Linen, a type of `Variable` in NNX."""

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def collection(name: str, kind: Kind) -> Collection:
    """Where a weight of this torch name belongs: running statistics where Flax's own BatchNorm keeps them."""
    if kind == "buffers":
        return "batch_stats" if name.rpartition(".")[2] in _STATISTICS else "buffers"
    return kind


def collections(module: FunctionalModule) -> dict[str, Collection]:
    """The collection of each weight, by torch name."""
    return {name: collection(name, spec.kind) for name, spec in module.specs.items()}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"0.weight": x}` as `{"0": {"weight": x}}`."""
    return unflatten_dict(dict(flat), sep=".")


def unnest(nested: Mapping[str, Any]) -> dict[str, Any]:
    """`{"0": {"weight": x}}` as `{"0.weight": x}`."""
    return flatten_dict(nested, sep=".")


def stop_gradient(x: Any) -> Any:
    """`jax.lax.stop_gradient`, at no cost where nothing is traced."""
    return jax.lax.stop_gradient(x) if isinstance(x, Tracer) else x
