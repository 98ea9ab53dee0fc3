"""A JAX function over flat arrays that knows its derivative and batched forms, each again one."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..values.dtypes import is_inexact, to_torch_dtype
from .errors import failure
from .settings import entered, settings_here

Flat = Callable[..., Sequence[Any]]


class JaxCall:
    """A pure JAX function over flat arrays of fixed shapes and dtypes.

    torch's conventions hold for its derivatives: what torch calls the gradient of a complex number is the conjugate of
    JAX's cotangent, so `vjp` conjugates on its way in and out.
    """

    def __init__(self, fn: Flat, avals: Sequence[jax.ShapeDtypeStruct], name: str):
        self.fn, self.avals, self.name = fn, tuple(avals), name
        self.dtypes = tuple(to_torch_dtype(a.dtype) for a in self.avals)
        self.settings = settings_here()
        self._made: dict[Any, Any] = {}
        self._making = threading.RLock()
        try:
            self.out_avals: tuple[Any, ...] = tuple(jax.eval_shape(fn, *self.avals))
        except Exception as exc:
            raise failure(name, self.avals, exc) from exc
        self.inexact = tuple(i for i, a in enumerate(self.avals) if is_inexact(a.dtype))
        self.inexact_outs = tuple(i for i, a in enumerate(self.out_avals) if is_inexact(a.dtype))
        self.program = jax.jit(self._with_memory_of_its_own)

    def program_within(self) -> Any:
        """The program as it can be compiled while another one runs on the same GPU, for which XLA's autotuner waits."""
        options: dict[str, Any] = {"xla_gpu_autotune_level": 0}
        return self.remembered("within", lambda: jax.jit(self._with_memory_of_its_own, compiler_options=options))

    def _with_memory_of_its_own(self, *arrays: Any) -> list[Any]:
        """The outputs, none of which is an operand or another output, into which torch might write."""
        seen = {id(x) for x in arrays}
        outs = []
        for y in self.fn(*arrays):
            is_new = isinstance(y, Tracer) and id(y) not in seen
            seen.add(id(y))
            outs.append(y if is_new else jnp.copy(y))
        return outs

    def remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """What belongs to this call, made once."""
        if key not in self._made:
            with self._making:
                if key not in self._made:
                    with entered(self.settings):
                        self._made[key] = make()
        return self._made[key]

    def jvp(self, active: tuple[int, ...]) -> "JaxCall":
        """`(x, t) -> J t`, for tangents of `active` operands; its outputs are those of inexact outputs."""

        def fn(*operands: Any) -> Sequence[Any]:
            x, t = operands[: len(self.avals)], operands[len(self.avals) :]
            _, tangents = jax.jvp(self.of_active(x, active), [x[i] for i in active], list(t))
            return tangents

        return self.remembered(("jvp", active), lambda: self._derived(fn, [self.avals[i] for i in active], "JVP"))

    def vjp(self, active: tuple[int, ...], present: tuple[int, ...]) -> "JaxCall":
        """`(x, ct) -> J^T ct`, the gradients of `active` operands for those of `present` outputs."""

        def fn(*operands: Any) -> Sequence[Any]:
            x, ct = operands[: len(self.avals)], operands[len(self.avals) :]
            _, pullback = jax.vjp(self.of_active(x, active), *(x[i] for i in active))
            return self.pull(pullback, present, ct)

        return self.remembered(
            ("vjp", active, present), lambda: self._derived(fn, [self.out_avals[i] for i in present], "gradient")
        )

    def vmap(self, in_dims: tuple[int | None, ...], size: int) -> "JaxCall":
        """The call for each example, whose outputs have the batch axis in front."""

        def make() -> JaxCall:
            avals = [
                a if d is None else jax.ShapeDtypeStruct((*a.shape[:d], size, *a.shape[d:]), a.dtype)
                for a, d in zip(self.avals, in_dims, strict=True)
            ]
            return JaxCall(jax.vmap(self.fn, in_dims, 0, axis_size=size), avals, self.name)

        return self.remembered(("vmap", in_dims, size), make)

    def of_active(self, x: Sequence[Any], active: tuple[int, ...]) -> Callable[..., list[Any]]:
        """The inexact outputs as a function of `active` operands, the others as they are in `x`."""

        def fn(*values: Any) -> list[Any]:
            operands = list(x)
            for i, value in zip(active, values, strict=True):
                operands[i] = value
            outs = self.fn(*operands)
            return [outs[i] for i in self.inexact_outs]

        return fn

    def pull(self, pullback: Callable[..., Any], present: tuple[int, ...], ct: Sequence[Any]) -> list[Any]:
        """What torch calls gradients, by JAX's pullback."""
        given = dict(zip(present, ct, strict=True))
        cotangents = [
            jnp.conj(given[i]) if i in given else jnp.zeros(self.out_avals[i].shape, self.out_avals[i].dtype)
            for i in self.inexact_outs
        ]
        return [jnp.conj(g) for g in pullback(cotangents)]

    def _derived(self, fn: Flat, more: Sequence[Any], what: str) -> "JaxCall":
        return JaxCall(fn, [*self.avals, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in more)], _of(what, self.name))


def _of(what: str, name: str) -> str:
    return f"the {what} of {name}"


def aval_of(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an operand."""
    return jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
