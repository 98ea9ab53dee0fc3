"""What JAX keeps to itself."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import torch
from jax._src import core as _jax_core
from jax._src import dispatch as _jax_dispatch
from jax._src import sharding_impls as _jax_shardings
from jax._src import util as _jax_util
from jax._src.interpreters import ad as _jax_ad
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib import xla_client as _xla_client  # pyright: ignore[reportPrivateImportUsage]

_C: Any = torch._C


def let_caches_hold_weakly(kinds: Iterable[type]) -> None:
    """JAX's caches of abstract evaluation hold parameters of these types weakly; else dropped functions stay."""
    getattr(_jax_util, "weakref_cache_key_types", set()).update(kinds)


def ask_for_devices(primitive: Any) -> None:
    """Have JAX say, when it lowers a program with this primitive, which devices it is for."""
    _jax_dispatch.prim_requires_devices_during_lowering.add(primitive)


def devices_of(axis_context: Any) -> tuple[Any, ...]:
    """The devices that XLA is to partition a program for; none in one for a device each (`shard_map`, `pmap`)."""
    if isinstance(axis_context, _jax_shardings.ShardingContext):
        return axis_context.device_assignment or ()
    return ()


def is_for_one_device(axis_context: Any) -> bool:
    """Whether a program runs on a single device, none of several that wait for each other."""
    if isinstance(axis_context, _jax_shardings.ShardingContext):
        return axis_context.num_devices == 1
    return axis_context.mesh.size == 1


def another_cpu() -> Any:
    """A device on the CPU with a client of XLA's, and so with threads, of its own."""
    return _xla_client.make_cpu_client().local_devices()[0]


def axes_left_to_xla(axis_context: Any) -> tuple[str, ...]:
    """Within a `shard_map` over some axes of a mesh: the others, over which XLA partitions its body."""
    if not isinstance(axis_context, _jax_shardings.SPMDAxisContext):
        return ()
    sizes = axis_context.mesh.shape
    return tuple(axis for axis in sizes if axis not in axis_context.manual_axes and sizes[axis] > 1)


def is_tracing() -> bool:
    """Whether JAX traces in this thread: what is called then becomes part of the trace, constants included."""
    return not _jax_core.trace_ctx.is_top_level()


def view_as_array(tensor: torch.Tensor, device: Any) -> jax.Array:
    """A dense tensor on the CPU as an array: `jax.dlpack.from_dlpack`, at a tenth of its time."""
    return _jax.dlpack_managed_tensor_to_buffer(_C._to_dlpack(tensor), device, None)


def view_as_tensor(array: jax.Array) -> torch.Tensor:
    """An array on the CPU as a tensor: `torch.from_dlpack`, at a fifth of its time."""
    return _C._from_dlpack(_jax.buffer_to_dlpack_managed_tensor(array))


def set_linearization(primitive: Any, rule: Callable[..., Any]) -> None:
    """Give a primitive a rule for linearization, which JAX tells whether reverse mode asks.

    `rule(is_reverse, nonzeros, *primals, **params)` gives the outputs, whether each has a tangent, residuals, and a
    function of those and of tangents; or None, where JAX is to go by the rule for forward mode. Without it, it always
    would.
    """
    has_structured_residuals = jax.__version_info__ >= (0, 11)

    def linearize(is_reverse: bool, nonzeros: Any, *primals: Any, **params: Any) -> Any:
        found = rule(is_reverse, nonzeros, *primals, **params)
        if found is None:
            return _jax_ad.fallback_linearize_rule(primitive, is_reverse, nonzeros, *primals, **params)
        if not has_structured_residuals:
            return found
        *others, linear = found
        return *others, None, lambda residuals, _, *tangents: linear(residuals, *tangents)

    _jax_ad.primitive_linearizations[primitive] = linearize
