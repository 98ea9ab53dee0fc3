"""`torch_call`: one JAX primitive for every torch call, and its rules."""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive, Var
from jax.interpreters import ad, batching, mlir, partial_eval

from .calls.base import Base
from .calls.batching import Vmap, vmap
from .calls.call import Computation, TorchCall, take
from .calls.derivative import Jvp, Vjp, linearize
from .calls.handles import HANDLE
from .calls.per_example import PerExampleVjp, over_batch
from .calls.residuals import drop_with
from .calls.save import Save
from .internals.jax import ask_for_devices, let_caches_hold_weakly, set_linearization
from .sharding import partition
from .sharding.manual import align
from .sharding.types import result_types

torch_call_p = Primitive("torch_call")
torch_call_p.multiple_results = True
eager_call_p = Primitive("torch_call_eager")
eager_call_p.multiple_results = True


# JAX caches results of abstract evaluation by the parameters of equations; a call in there is to die as a jaxpr does.
let_caches_hold_weakly({Base, Jvp, Vjp, Save, Vmap, PerExampleVjp})


def bind(call: TorchCall, *operands: Any) -> list[Any]:
    """Apply a torch call to JAX arrays or tracers."""
    return torch_call_p.bind(*align(operands), call=call)


# --- evaluation ----------------------------------------------------------------------------------


class _Reference:
    """A call, as JAX's caches may hold it."""

    def __init__(self, call: TorchCall):
        self._call = weakref.ref(call)

    def __call__(self) -> TorchCall:
        call = self._call()
        assert call is not None, "the caller of an eager program holds its call"
        return call


def _compiled(call: TorchCall) -> Callable[..., list[jax.Array]]:
    """The program of an eager call. It lives as long as the call, of which JAX's caches hold a reference only."""
    reference = _Reference(call)

    def run(*operands: jax.Array) -> list[Any]:
        return eager_call_p.bind(*align(operands), call=reference)

    run.__name__ = run.__qualname__ = call.name
    return jax.jit(run)


@torch_call_p.def_impl
def _impl(*operands: Any, call: TorchCall) -> list[jax.Array]:
    with jax.disable_jit(False):  # it would evaluate `bind` again, for ever
        results = call.derive(_compiled)(*operands)
    if isinstance(call, Save):
        drop_with(results[-1])
    return results


@eager_call_p.def_impl
def _deoptimized(*operands: Any, call: _Reference) -> NoReturn:
    """Where `jax.debug_nans` or `jax.debug_infs` look for the op behind an invalid value: this is it."""
    raise FloatingPointError(f"invalid value (nan or infinity) encountered in {call().name}")


def _abstract_eval(*avals: Any, call: TorchCall) -> list[ShapedArray]:
    return result_types(call, avals)


def _of_reference(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule of `torch_call`, for the eager one."""
    return lambda *args, call: rule(*args, call=call())


torch_call_p.def_abstract_eval(_abstract_eval)
eager_call_p.def_abstract_eval(_of_reference(_abstract_eval))
mlir.register_lowering(torch_call_p, functools.partial(partition.lower, repeats=True))
mlir.register_lowering(eager_call_p, _of_reference(functools.partial(partition.lower, repeats=False)))
ask_for_devices(torch_call_p)
ask_for_devices(eager_call_p)


# --- differentiation -----------------------------------------------------------------------------


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: TorchCall) -> tuple[list[Any], list[Any]]:
    active = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    if not call.base.options.forward_mode:
        return _reverse_only(call, active, primals, tangents)
    given = [tangents[i] for i in active]
    out_primals, _, residuals, tangents_of = _linearized(call, active, primals, is_reverse=_may_be_remat(given))
    return out_primals, tangents_of(residuals, given)


def _linearized(
    call: TorchCall, active: tuple[int, ...], primals: Sequence[Any], *, is_reverse: bool
) -> tuple[list[Any], tuple[int, ...], list[Any], Callable[[Sequence[Any], Sequence[Any]], list[Any]]]:
    """The outputs, those that have tangents, what these depend on, and their linear map from those of the `active`
    operands."""
    if is_reverse and call.inexact_outs and _keeps_graph(call):
        outs, tangent_call = call.inexact_outs, call.derive(Jvp, active, call.inexact_outs, True)
        *out_primals, handle = bind(call.derive(Save, active), *primals)
        residuals = [*primals, handle]
    else:
        tangent_call, operands, outs = linearize(call, active)
        out_primals, residuals = bind(call, *primals), list(take(primals, operands))
    zeros = [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in out_primals]

    def tangents_of(residuals: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        out_tangents = bind(tangent_call, *residuals, *given) if outs else []
        by_output = dict(zip(outs, out_tangents, strict=True))
        return [by_output.get(o, zero) for o, zero in enumerate(zeros)]

    return out_primals, outs, residuals, tangents_of


def _linearize(is_reverse: bool, nonzeros: Sequence[bool], *primals: Any, call: TorchCall) -> tuple[Any, ...] | None:
    """The rule by which JAX says whether a transpose will follow, through `jit`, `scan` and `cond` too."""
    if not call.base.options.forward_mode:
        return None
    active = tuple(i for i, nz in enumerate(nonzeros) if nz)
    out_primals, outs, residuals, tangents_of = _linearized(call, active, primals, is_reverse=is_reverse)

    def linear(residuals: Sequence[Any], *tangents: Any) -> list[Any]:
        return tangents_of(residuals, [tangents[i] for i in active])

    return out_primals, [o in outs for o in range(len(out_primals))], residuals, linear


def _keeps_graph(call: TorchCall) -> bool:
    return call.base.options.residuals == "live" and not call.differentiated and call.graphless() is None


def _may_be_remat(tangents: Sequence[Any]) -> bool:
    """Whether a transpose may follow though JAX asks for forward mode: in the block of a `jax.checkpoint`.

    That has no rule for linearization (JAX 0.10 to 0.12): it stages the rule for forward mode, and divides what comes
    of it. A staged forward mode looks the same, and lets go of graphs that it has no use for. (Tried without: policies
    that save everything would run the forward again.)
    """
    return any(isinstance(t, partial_eval.DynamicJaxprTracer) for t in tangents)


ad.primitive_jvps[torch_call_p] = _jvp
set_linearization(torch_call_p, _linearize)


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

    live = _keeps_graph(call)

    def forward(*xs: Any) -> tuple[list[Any], tuple[Any, ...]]:
        if not live:
            return bind(call, *xs), xs
        *results, handle = bind(call.derive(Save, active), *xs)
        return results, (*xs, handle)

    def backward(residuals: tuple[Any, ...], cotangents: list[Any]) -> tuple[Any, ...]:
        grads = bind(call.derive(Vjp, active, outs, live), *residuals, *take(cotangents, outs))
        by_operand = dict(zip(active, grads, strict=True))
        return tuple(by_operand.get(i) for i in range(len(primals)))

    function.defvjp(forward, backward)
    instantiated = [_instantiate(x, t) for x, t in zip(primals, tangents, strict=True)]
    return jax.jvp(function, tuple(primals), tuple(instantiated))


def _instantiate(primal: Any, tangent: Any) -> Any:
    if type(tangent) is not ad.Zero:
        return tangent
    if jax.typeof(primal).to_tangent_aval().dtype == jax.dtypes.float0:
        return np.zeros(primal.shape, jax.dtypes.float0)
    return ad.instantiate_zeros(tangent)


# --- batching ------------------------------------------------------------------------------------


def _batch(operands: Sequence[Any], dims: Sequence[Any], *, call: TorchCall) -> tuple[list[Any], list[Any]]:
    in_dims = tuple(None if d is None else int(d) for d in dims)
    if all(d is None for d in in_dims):
        return bind(call, *operands), [None] * len(call.out_avals)
    size = next(x.shape[d] for x, d in zip(operands, in_dims, strict=True) if d is not None)
    live = over_batch(call, in_dims, size)
    if live is not None:
        outs = bind(live, *operands)
        return outs, [None if aval is HANDLE else 0 for aval in call.out_avals]
    graphless = call.graphless()
    if graphless is not None:
        inner, kept = graphless
        outs, out_dims = _batch(take(operands, kept), take(in_dims, kept), call=inner)
        handles = [jnp.zeros(aval.shape, aval.dtype) for aval in call.out_avals[len(outs) :]]
        return [*outs, *handles], [*out_dims, *(None for _ in handles)]
    assert isinstance(call, Computation)  # all others make or take a graph
    batched = vmap(call, in_dims, size)
    return bind(batched, *operands), list(batched.out_dims)


batching.primitive_batchers[torch_call_p] = _batch


# --- dead code -----------------------------------------------------------------------------------


def _dce(used_outputs: list[bool], eqn: Any) -> tuple[list[bool], Any]:
    """Gradients that nothing uses are not computed."""
    used = tuple(i for i, u in enumerate(used_outputs) if u)
    if not used:
        return [False] * len(eqn.invars), None
    selected = eqn.params["call"].dce(used) if len(used) < len(used_outputs) else None
    if selected is None:
        return [True] * len(eqn.invars), eqn
    call, operands = selected
    given = used if len(call.out_avals) == len(used) else range(len(call.out_avals))
    smaller = eqn.replace(
        invars=[eqn.invars[i] for i in operands],
        outvars=[eqn.outvars[i] for i in given],
        params={"call": call},
    )
    return [i in operands for i in range(len(eqn.invars))], smaller


def _as_jax_calls_it(dce: Callable[..., Any]) -> Callable[..., Any]:
    """Since JAX 0.12 a DCE rule is also told which inputs are live, which matters to Refs alone."""
    if jax.__version_info__ < (0, 12):
        return dce
    return lambda used_outputs, live_inputs, eqn: dce(used_outputs, eqn)


partial_eval.dce_rules[torch_call_p] = _as_jax_calls_it(_dce)


# --- rematerialisation ---------------------------------------------------------------------------


def _remat(saveable: Any, unknown: Sequence[bool], recomputed: Sequence[bool], eqn: Any) -> tuple[Any, ...]:
    """`jax.checkpoint`: a forward call that is run again would keep its graph from then on, and XLA, which does not
    know what a graph weighs, runs it early. So a backward call does without one unless the policy saves its handle.

    `jax_remat3` asks no such rule, and needs none: it runs a block again when the block's cotangents are there, not
    before, and the graphs that the block keeps are those that its backward calls use, at once.
    """
    n = len(eqn.outvars)
    residuals = [x for x, again in zip(eqn.invars, recomputed, strict=True) if isinstance(x, Var) and not again]
    if any(unknown):
        graphless = eqn.params["call"].graphless()
        if graphless is not None:
            call, kept = graphless
            if all(again for i, again in enumerate(recomputed) if i not in kept):
                eqn = eqn.replace(invars=[eqn.invars[i] for i in kept], params={"call": call})
        return None, eqn, [True] * n, [True] * n, residuals
    if saveable(eqn.primitive, *(x.aval for x in eqn.invars), **eqn.params) is True:
        return eqn, None, [False] * n, [False] * n, []
    return eqn, eqn, [False] * n, [True] * n, residuals


partial_eval.partial_eval_jaxpr_custom_rules[torch_call_p] = _remat
