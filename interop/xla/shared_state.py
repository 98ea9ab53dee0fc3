"""State under `jax.vmap`: what examples share, and each would change in its own way, is refused.

JAX itself would go on with a state for each example, which most callers then lose.
"""

from collections.abc import Sequence
from typing import Any

from jax.core import ShapedArray
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ..errors import StateError

new_state_p = Primitive("new_state")
"""Takes old values and then new ones, and returns the new ones."""
new_state_p.multiple_results = True


def new_state(name: str, names: Sequence[str], old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """New values of a callable's state, operands `names`, in the place of old ones."""
    return new_state_p.bind(*old, *new, name=name, names=tuple(names)) if names else []


def _new(values: Sequence[Any]) -> list[Any]:
    return list(values[len(values) // 2 :])


@new_state_p.def_impl
def _impl(*values: Any, name: str, names: tuple[str, ...]) -> list[Any]:
    return _new(values)


@new_state_p.def_abstract_eval
def _abstract_eval(*avals: ShapedArray, name: str, names: tuple[str, ...]) -> list[ShapedArray]:
    return _new(avals)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **options: Any) -> tuple[list[Any], list[Any]]:
    return new_state_p.bind(*primals, **options), _new(tangents)


def _batch(values: Sequence[Any], dims: Sequence[Any], *, name: str, names: tuple[str, ...]) -> Any:
    old, new = dims[: len(names)], dims[len(names) :]
    shared = [n for n, before, after in zip(names, old, new, strict=True) if before is None and after is not None]
    if shared:
        raise StateError(
            f"vmap of {name}: the examples share the state {', '.join(f'`{n}`' for n in shared)}, which each would "
            "change in its own way; torch's statistics are those of the whole batch. Call the module on the whole "
            "batch outside vmap (vmap only the JAX parts of the model), or give each example its own parameters and "
            "state (torchleaf.stack)."
        )
    return new_state_p.bind(*values, name=name, names=names), list(new)


ad.primitive_jvps[new_state_p] = _jvp
batching.primitive_batchers[new_state_p] = _batch
mlir.register_lowering(new_state_p, lambda ctx, *values, **options: _new(values))
jet.jet_rules[new_state_p] = lambda primals, series, **options: (new_state_p.bind(*primals, **options), _new(series))
