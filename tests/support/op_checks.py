"""What is tried with operators of torch's database: each transformation, eager and compiled, against torch itself."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchleaf
from op_database import Case, cases, inner, is_inexact, name_of, plain_attention

SECOND = ("reverse over reverse", "forward over reverse", "reverse over forward", "forward over forward")
BATCHED = ("vmap", "nested vmap", "vmap of gradient")
RUNS = 4
"""How often a compiled program runs, each time on other values: it is recorded, then replayed."""

UNINITIALISED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
Programs = dict[str, Callable[..., Any]]


@dataclass(frozen=True)
class Outcome:
    """Of one transformation of one sample: it is right unless it is wrong, or torch itself cannot do it."""

    operator: str
    sample: int
    transformation: str
    wrong: str = ""
    not_applicable: str = ""


def outcomes(
    op: Any, dtype: torch.dtype, most: int, transformations: Collection[str] = (), **options: Any
) -> Iterator[Outcome]:
    """Those of all transformations of a few samples, by a `torch_function` of these options.

    If transformations are named, it is those only, each compiled once.
    """
    if op.name.startswith("jiterator"):
        yield Outcome(name_of(op), 0, "forward", not_applicable="torch: it runs on GPUs only")
        return
    if op.name in UNINITIALISED:
        yield Outcome(name_of(op), 0, "forward", not_applicable="uninitialised memory")
        return
    for i, case in enumerate(cases(op, dtype, most)):
        if any(x.layout != torch.strided for x in case.operands):
            yield Outcome(name_of(op), i, "forward", not_applicable="sparse operands")
            continue
        runs = 1 if transformations else RUNS
        points = [case, *(case.at(case.near(seed)) for seed in range(1, runs))]
        failure = _attempt(lambda case=case: case.gradient) if op.supports_autograd else None
        if isinstance(failure, Exception):
            yield Outcome(name_of(op), i, "gradient", not_applicable=f"torch: {_short(failure)}")
        is_differentiable = op.supports_autograd and not isinstance(failure, Exception)
        with plain_attention():
            every = programs(case, differentiable=is_differentiable, **options)
            every = {name: f for name, f in every.items() if name in transformations or not transformations}
            for name, found in _verdicts(every, points, eager=not transformations):
                yield Outcome(name_of(op), i, name, **found)


# --- in JAX ----------------------------------------------------------------------------------------


def programs(case: Case, *, differentiable: bool, **options: Any) -> Programs:
    """Each transformation of a case, as a function of its operands, or of a batch of them."""
    ours = torchleaf.torch_function(lambda *operands: case.function(*operands), **options)
    u, v = tuple(map(_array, case.u)), tuple(map(_array, case.v))
    weights = {i: _array(w.conj()) for i, w in case.weights.items()}
    every = tuple(range(len(case.operands)))

    def total(*operands: Any) -> Any:
        outs = ours(*operands)
        return sum(_inner(w, outs[i]) for i, w in weights.items())

    def slope(*operands: Any) -> Any:
        return jax.jvp(total, operands, u)[1]

    def slope_by_gradient(*operands: Any) -> Any:
        return sum(map(_inner, gradient(*operands), u))

    def second(name: str) -> Callable[..., Any]:
        first = slope_by_gradient if name.endswith("over reverse") else slope
        if name.startswith("forward"):
            return lambda *operands: jax.jvp(first, operands, v)[1]
        return lambda *operands: sum(map(_inner, jax.grad(first, every)(*operands), v))

    gradient = jax.grad(total, every)
    found = {"forward": ours}
    if every:
        found |= {"vmap": jax.vmap(ours), "nested vmap": jax.vmap(jax.vmap(ours))}
    if every and weights and differentiable and case.gradient is not None:
        found |= {"gradient": gradient, "jvp": slope, "vmap of gradient": jax.vmap(gradient)}
        found |= {name: second(name) for name in SECOND}
    return found


@jax.jit
def _inner(a: Any, b: Any) -> Any:
    a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (a, b))
    product = (a * b).sum()
    return product.real if jnp.iscomplexobj(product) else product


def _array(tensor: torch.Tensor) -> jax.Array:
    tensor = tensor.detach().clone().resolve_conj().resolve_neg()  # some are torch's zeros without memory
    if tensor.itemsize // (1 + tensor.is_complex()) >= 4 or not is_inexact(tensor):
        return jnp.asarray(tensor.numpy())
    wide = tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)
    return jnp.asarray(wide.numpy()).astype("bfloat16" if tensor.dtype == torch.bfloat16 else wide.numpy().dtype)


# --- in torch --------------------------------------------------------------------------------------


def expected(name: str, case: Case) -> Any:
    """What torch gives for a transformation; None where it has no answer, at a kink."""
    match name:
        case "forward":
            return case.outputs
        case "gradient":
            return case.gradient
        case "jvp":
            return [torch.tensor(case.slope, dtype=torch.float64)]
        case _ if name in SECOND:
            if case.jumps:
                return None
            near, nearer = case.curvature(1e-5), case.curvature(3e-6)
            is_smooth = abs(near - nearer) <= 1e-3 * max(abs(near), abs(nearer), 1e-3)
            return [torch.tensor(nearer, dtype=torch.float64)] if is_smooth else None
    each = [c.gradient if name == "vmap of gradient" else c.outputs for c in _examples(case)]
    rows = [torch.stack(ys) for ys in zip(*each, strict=True)]
    return [torch.stack([r, torch.stack(r.unbind()[::-1])]) for r in rows] if name == "nested vmap" else rows


def arguments(name: str, case: Case) -> tuple[jax.Array, ...]:
    """The operands of a transformation."""
    if name not in BATCHED:
        return tuple(map(_array, case.operands))
    rows = [jnp.stack(list(map(_array, xs))) for xs in zip(*(c.operands for c in _examples(case)), strict=True)]
    return tuple(jnp.stack([r, r[::-1]]) for r in rows) if name == "nested vmap" else tuple(rows)


def _examples(case: Case) -> list[Case]:
    return [case, *(case.at(case.near(seed)) for seed in (11, 12))]


# --- both ------------------------------------------------------------------------------------------


def _verdicts(every: Programs, points: list[Case], *, eager: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """What speaks against each transformation: eager at the first point, if that is asked for, compiled at all."""
    right = {name: [_attempt(expected, name, point) for point in points] for name in every}

    @jax.jit
    def together(operands: dict[str, Any]) -> dict[str, Any]:
        return {name: every[name](*given) for name, given in operands.items()}

    known = [name for name in every if not any(isinstance(x, Exception) for x in right[name])]
    compiled = [_attempt(together, {name: arguments(name, point) for name in known}) for point in points]
    for name, program in every.items():
        failure = next((x for x in right[name] if isinstance(x, Exception)), None)
        if failure is not None:
            yield name, {"not_applicable": f"torch: {_short(failure)}"}
            continue
        given = arguments(name, points[0])
        runs = [("eager", _attempt(program, *given), points[0], right[name][0])] if eager else []
        for i, (point, results) in enumerate(zip(points, compiled, strict=True)):
            alone = isinstance(results, Exception)  # another transformation failed
            result = _attempt(jax.jit(program), *arguments(name, point)) if alone else results[name]
            runs.append((f"run {i}", result, point, right[name][i]))
        yield name, next((found for run in runs if (found := _verdict(name, *run))), {})


def _attempt(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, or the exception that it raised."""
    try:
        return jax.block_until_ready(function(*args))
    except Exception as exc:
        return exc


def _verdict(name: str, run: str, actual: Any, point: Case, right: Any) -> dict[str, str]:
    """What speaks against the result of a run."""
    if isinstance(actual, Exception):
        reason = _why_not(name, actual, point)
        return {"not_applicable": reason} if reason else {"wrong": f"{run}: {_short(actual)}"}
    if right is None:
        return {"not_applicable": "not differentiable there"}
    tolerance, is_double = _tolerance(name, point), _precision(point) == 8
    size = point.largest_slope if name == "jvp" and not is_double else 0
    least = 1e-9 if is_double else 1e-3 * tolerance
    difference = _difference(jax.tree.leaves(actual), right, tolerance, least, size)
    return {"wrong": f"{run}: {difference}"} if difference else {}


REFUSED = (
    "draws random numbers",
    "has no JAX counterpart",
    "JAX has dense arrays only",
    "reads values of its operands",
    "a tensor whose shape depends on values",
)
"""Parts of torchleaf's messages for what is no function of arrays."""


def _why_not(name: str, exc: Exception, case: Case) -> str | None:
    """Why a transformation that fails need not succeed: it is no function of arrays, or torch fails as well."""
    reason = next((r for r in REFUSED if r in str(exc)), None)
    failure = _failure_of_double_backward(case) if name in SECOND and reason is None else None
    return reason if failure is None else f"torch: {_short(failure)}"


def _failure_of_double_backward(case: Case) -> Exception | None:
    leaves = [x.clone().requires_grad_() for x in case.operands]
    try:
        outs = case.function(*leaves)
        total = sum(inner(w, outs[i]) for i, w in case.weights.items())
        assert isinstance(total, torch.Tensor)
        grads = [g for g in torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True) if g is not None]
        torch.autograd.grad([inner(g, g) for g in grads], leaves, allow_unused=True)
    except Exception as exc:
        return exc
    return None


def _tolerance(name: str, case: Case) -> float:
    """In relation to the largest value."""
    second = name in SECOND
    return {1: 0.3, 2: 3e-2, 4: 1e-3 if second else 1e-4, 8: 1e-4 if second else 1e-6}[_precision(case)]


def _precision(case: Case) -> int:
    """The bytes of its least precise number."""
    return min(x.itemsize // (1 + x.is_complex()) for x in (*case.operands, *case.outputs) if is_inexact(x))


def _difference(actual: list[jax.Array], right: list[torch.Tensor], tolerance: float, least: float, size: float) -> str:
    """What tells results from those that are right; nothing if they are, but for `least`.

    The tolerance is in relation to the largest of them, or to `size`, if that is larger.
    """
    if len(actual) != len(right):
        return f"{len(actual)} results instead of {len(right)}"
    for i, (a, e) in enumerate(zip(actual, right, strict=True)):
        wide = torch.complex128 if e.is_complex() else torch.float64
        there, here = e.detach().clone().resolve_conj().to(wide).numpy(), np.asarray(a.astype(np.dtype(str(wide)[6:])))
        if here.shape != there.shape:
            return f"result {i} has shape {here.shape} instead of {there.shape}"
        known = np.isfinite(there)
        errors, largest = np.abs(here - there)[known], np.abs(there[known]).max(initial=size)
        allowed = max(tolerance * largest, least) if is_inexact(e) else 0
        if not (errors <= allowed).all():
            return f"result {i} is off by {errors.max():.2g} where the largest value is {largest:.2g}"
    return ""


def _short(exc: Exception) -> str:
    return re.sub(r"\s+", " ", f"{type(exc).__name__}: {exc}")[:200]
