"""`torch_call`: one JAX primitive for every torch call, and its rules."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval

from . import sharding, transport
from .call import TorchCall, Vjp

torch_call_p = Primitive("torch_call")
torch_call_p.multiple_results = True


def bind(call: TorchCall, *operands: Any) -> list[Any]:
    """Apply a torch call to JAX arrays or tracers."""
    return torch_call_p.bind(*sharding.align(operands), call=call)


# --- evaluation ----------------------------------------------------------------------------------

_compiled = jax.jit(bind, static_argnums=0)


@torch_call_p.def_impl
def _impl(*operands: Any, call: TorchCall) -> list[jax.Array]:
    return _compiled(call, *operands)


@torch_call_p.def_abstract_eval
def _abstract_eval(*avals: Any, call: TorchCall) -> list[ShapedArray]:
    return [sharding.result_aval(aval.shape, aval.dtype, avals) for aval in call.out_avals]


mlir.register_lowering(torch_call_p, transport.lower)


# --- differentiation -----------------------------------------------------------------------------


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: TorchCall) -> tuple[list[Any], list[Any]]:
    active = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    if not call.forward_mode:
        return _reverse_only(call, active, primals, tangents)
    tangent_call, residuals, outs = call.linearize(active)
    out_primals = bind(call, *primals)
    out_tangents: list[Any] = [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in out_primals]
    if outs:
        operands = [primals[i] for i in residuals] + [tangents[i] for i in active]
        for o, tangent in zip(outs, bind(tangent_call, *operands), strict=True):
            out_tangents[o] = tangent
    return out_primals, out_tangents


ad.primitive_jvps[torch_call_p] = _jvp


def _transpose(cotangents: Sequence[Any], *operands: Any, call: TorchCall) -> list[Any]:
    linear = tuple(i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
    outs = tuple(o for o, ct in enumerate(cotangents) if type(ct) is not ad.Zero)
    result: list[Any] = [None] * len(operands)
    transposed, residuals = call.transpose(linear, outs)
    grads = bind(transposed, *(operands[i] for i in residuals), *(cotangents[o] for o in outs))
    for i, grad in zip(linear, grads, strict=True):
        result[i] = grad
    return result


ad.primitive_transposes[torch_call_p] = _transpose


def _reverse_only(
    call: TorchCall, active: tuple[int, ...], primals: Sequence[Any], tangents: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """The rule for `forward_mode=False`: `jax.custom_vjp`, whose forward mode raises JAX's own message."""
    outs = call.inexact_outs

    @jax.custom_vjp
    def function(*xs: Any) -> list[Any]:
        return bind(call, *xs)

    def forward(*xs: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return bind(call, *xs), xs

    def backward(xs: tuple[Any, ...], cotangents: list[Any]) -> tuple[Any, ...]:
        grads = bind(call.derive(Vjp, active, outs), *xs, *(cotangents[o] for o in outs))
        by_operand = dict(zip(active, grads, strict=True))
        return tuple(by_operand.get(i) for i in range(len(xs)))

    function.defvjp(forward, backward)
    instantiated = [_instantiate(x, t) for x, t in zip(primals, tangents, strict=True)]
    return jax.jvp(function, tuple(primals), tuple(instantiated))


def _instantiate(primal: Any, tangent: Any) -> Any:
    if type(tangent) is not ad.Zero:
        return tangent
    if tangent.aval.dtype == jax.dtypes.float0:
        return np.zeros(primal.shape, jax.dtypes.float0)
    return ad.instantiate_zeros(tangent)


# --- batching ------------------------------------------------------------------------------------


def _batch(operands: Sequence[Any], dims: Sequence[Any], *, call: TorchCall) -> tuple[list[Any], list[int]]:
    in_dims = tuple(None if d is None else int(d) for d in dims)
    size = next(x.shape[d] for x, d in zip(operands, in_dims, strict=True) if d is not None)
    outs = bind(call.vmap(in_dims, size, call.base.vmap_method), *operands)
    return outs, [0] * len(outs)


batching.primitive_batchers[torch_call_p] = _batch


# --- dead code -----------------------------------------------------------------------------------


def _dce(used_outputs: list[bool], eqn: Any) -> tuple[list[bool], Any]:
    """Gradients that nothing uses are not computed."""
    used = tuple(i for i, u in enumerate(used_outputs) if u)
    if not used:
        return [False] * len(eqn.invars), None
    selected = eqn.params["call"].select(used) if len(used) < len(used_outputs) else None
    if selected is None:
        return [True] * len(eqn.invars), eqn
    call, operands = selected
    smaller = eqn.replace(
        invars=[eqn.invars[i] for i in operands],
        outvars=[eqn.outvars[i] for i in used],
        params={"call": call},
    )
    return [i in operands for i in range(len(eqn.invars))], smaller


partial_eval.dce_rules[torch_call_p] = _dce
