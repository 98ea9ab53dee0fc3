"""What a program does where a check fails: it raises an error if it can, and computes NaN if it cannot.

It can on one CPU or GPU, by [equinox.error_if](https://docs.kidger.site/equinox/api/errors/). Of several devices the
others would wait for ever for the one that raised; a TPU raises nothing; a program that is exported has no Python.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ..errors import TorchCallError
from ..internals.jax import is_for_one_device

one_unless_p = Primitive("one_unless")
"""Takes bools; where one is true it raises an error, or returns NaN, and one elsewhere."""


def one_unless(fails: Any, error: str, *, raises: bool, shows: bool) -> Any:
    """A factor for what a check is to guard, a float32 array like `fails`.

    **Arguments:**

    - `fails`: whether the check fails, a bool array.
    - `error`: what is raised.
    - `raises`: whether it may be raised.
    - `shows`: whether what is guarded has a dtype with a NaN; if not, there has to be an error.
    """
    return one_unless_p.bind(fails, error=error, raises=raises, shows=shows)


@one_unless_p.def_impl
def _impl(fails: Any, *, error: str, raises: bool, shows: bool) -> Any:
    if raises and fails.any():
        raise TorchCallError(error)
    return _nan_where(fails)


@one_unless_p.def_abstract_eval
def _abstract_eval(fails: ShapedArray, *, error: str, raises: bool, shows: bool) -> ShapedArray:
    return fails.update(dtype=jnp.dtype(jnp.float32))


def _lower(ctx: mlir.LoweringRuleContext, fails: Any, *, error: str, raises: bool, shows: bool) -> Any:
    module = ctx.module_context
    is_host_near = set(module.platforms) <= {"cpu", "cuda", "rocm"} and not module.lowering_parameters.for_export
    can_raise = raises and is_host_near and is_for_one_device(module.axis_context)
    if not (can_raise or shows):
        raise TorchCallError(
            f"{error}\nThat is so for some values, in a program that cannot raise errors: by strict=True, for export, "
            "for a TPU or for several devices. No result of the callable has a dtype with a NaN in its place. Return "
            "one that has, take the check out (validate_args=False), or use engine='torch'."
        )
    one = functools.partial(_raising, error) if can_raise else _nan_where
    return mlir.lower_fun(one, multiple_results=False)(ctx, fails)


def _raising(error: str, fails: Any) -> Any:
    return eqx.error_if(jnp.ones(fails.shape, jnp.float32), fails, error)


def _nan_where(fails: Any) -> Any:
    return jnp.where(fails, jnp.float32(jnp.nan), jnp.float32(1))


def _jvp(primals: Any, tangents: Any, **options: Any) -> Any:
    one = one_unless_p.bind(*primals, **options)
    return one, ad.Zero(jax.typeof(one))


def _jet(primals: Any, series: Any, **options: Any) -> Any:
    one = one_unless_p.bind(*primals, **options)
    return one, [jnp.zeros_like(one) for _ in series[0]]


mlir.register_lowering(one_unless_p, _lower)
batching.defvectorized(one_unless_p)
ad.primitive_jvps[one_unless_p] = _jvp
jet.jet_rules[one_unless_p] = _jet
