"""What is asked of a specimen: each check compares torchleaf with torch and gives a status and a text."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchleaf
from torch.utils._pytree import tree_flatten, tree_unflatten

from .jax_side import Ours, arrays_of, mean_square, numpy_of, weighted_sum
from .specimen import Specimen
from .torch_side import Torch, changes_state, state_of, to_numpy

RUNS = 5
"""The first two runs of a compiled call are recorded, those that follow replay it."""
EXAMPLES, STEPS, RATE = 3, 3, 1e-2
SINGLE, DOUBLE = 5e-4, 2e-5
"""Tolerances of float32 against torch and of float64 against finite differences."""


@dataclass(frozen=True)
class Outcome:
    """What a check gave: `ok`, `wrong` numbers, `refused` by torchleaf, another `error`, or `not asked`."""

    status: Literal["ok", "wrong", "refused", "error", "not asked"]
    text: str


class Wrong(Exception):
    """Numbers that are not torch's."""


class NotAsked(Exception):
    """Something that torch cannot do itself."""


# --- the checks, each returning the largest relative error --------------------------------------


def forward(specimen: Specimen) -> float:
    """Outputs, as they are and compiled, each run with other values."""
    return _over_runs(specimen, lambda side: side.outputs)


def gradients(specimen: Specimen) -> float:
    """Gradients by parameters and arguments, as they are and compiled, each run with other values."""
    return _over_runs(specimen, lambda side: side.gradients)


def batches(specimen: Specimen) -> float:
    """`vmap` over arguments, compiled, against a loop."""
    return _over_batch(specimen, lambda side: side.outputs)


def gradients_of_examples(specimen: Specimen) -> float:
    """`vmap` of gradients, compiled, against a loop."""
    return _over_batch(specimen, lambda side: side.gradients)


def second_derivatives(specimen: Specimen) -> float:
    """Hessian-vector products, forward over reverse and reverse over reverse."""
    with wide(specimen.smooth):
        torch_side, ours = Torch(specimen, double=specimen.smooth), Ours(specimen, double=specimen.smooth)
        arrays, static = ours.arguments(0)
        floats, others = eqx.partition(arrays, eqx.is_inexact_array)
        point, treedef = jax.tree.flatten(ours.in_order((ours.params, floats)))
        rng = np.random.default_rng(0)
        direction = [normal(rng, x) for x in point]
        args, tolerance = torch_side.arguments(0), DOUBLE if specimen.smooth else SINGLE
        if specimen.smooth:
            expected = torch_side.differences(args, direction, step=1e-5)
        else:
            expected = _what_torch_can(lambda: torch_side.double_backward(args, direction))

        def gradients(*point: Any) -> list[Any]:
            params, floats = ours.from_order(jax.tree.unflatten(treedef, point))
            return ours.gradients(params, eqx.combine(floats, others), static)

        def forward_over_reverse(*point: Any) -> Any:
            return jax.jvp(gradients, point, tuple(direction))[1]

        def reverse_over_reverse(*point: Any) -> Any:
            return [jnp.conj(p) for p in jax.vjp(gradients, *point)[1]([jnp.conj(d) for d in direction])]

        return max(
            compare(jax.jit(product)(*point), expected, product.__name__.replace("_", " "), tolerance)
            for product in (forward_over_reverse, reverse_over_reverse)
        )


def training(specimen: Specimen) -> float:
    """Losses and parameters over steps of gradient descent, with state where the module has any."""
    torch_side, ours = Torch(specimen), Ours(specimen)
    if not torch_side.parameters:
        raise NotAsked("no parameters")
    optimizer = optax.sgd(RATE)

    @eqx.filter_jit
    def step(params: Any, state: Any, arrays: Any, static: Any) -> Any:
        def loss(params: Any) -> Any:
            outputs, new = ours.call(params, arrays, static, state)
            return mean_square(outputs), new

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        grads = jax.tree.map(jnp.conj, grads)  # optax asks for it where parameters are complex
        updates, _ = optimizer.update(grads, optimizer.init(params))
        return optax.apply_updates(params, updates), state, value

    params, state, losses = ours.params, ours.state, []
    for number in range(STEPS):
        params, state, loss = step(params, state, *ours.arguments(number))
        losses.append(loss)
    expected = torch_side.train(RATE, STEPS)
    error = compare(losses, [np.array(x) for x in expected], "losses")
    return max(
        error, compare(ours.in_order((params, None))[0], numpy_of_tensors(torch_side.parameters.values()), "parameters")
    )


def state(specimen: Specimen) -> float:
    """Buffers after several calls."""
    if not changes_state(specimen):
        raise NotAsked("a call changes no buffers")
    torch_side, ours = Torch(specimen), Ours(specimen)
    state, run, error = ours.state, eqx.filter_jit(ours.call), 0.0
    for number in range(RUNS):
        outputs, state = run(ours.params, *ours.arguments(number), state)
        expected = numpy_of_tensors(torch_side.outputs(torch_side.arguments(number)))
        error = max(error, compare(outputs, expected, f"run {number + 1}"))
    buffers = ours.model.buffers_in(state)
    expected = state_of(torch_side.module)
    return max(error, compare([buffers[name] for name in expected], list(expected.values()), "buffers"))


def keys(specimen: Specimen) -> float:
    """In training mode: same key, same numbers; other keys, others; the gradient is that of the forward's numbers."""
    if not specimen.random:
        raise NotAsked("draws no random numbers")
    with wide(specimen.smooth):
        ours = Ours(specimen, double=specimen.smooth, training=True)
        arrays, static = ours.arguments(0)
        key, other = jax.random.split(jax.random.key(0))

        def outputs(params: Any, key: Any) -> list[Any]:
            return ours.call(params, arrays, static, ours.state, key)[0]

        run = jax.jit(outputs)
        first = numpy_of(run(ours.params, key))
        error = 0.0
        for _ in range(RUNS - 1):
            error = max(error, compare(run(ours.params, key), first, "the same key"))
        error = max(error, compare(outputs(ours.params, key), first, "the same key, not compiled"))
        if all(np.array_equal(a, b) for a, b in zip(first, numpy_of(run(ours.params, other)), strict=True)):
            raise Wrong("another key gives the same numbers")
        return max(error, _slope(lambda params: weighted_sum(outputs(params, key)), ours.params, specimen.smooth))


CHECKS: dict[str, Callable[[Specimen], float]] = {
    "forward": forward,
    "gradients": gradients,
    "vmap": batches,
    "vmap of gradients": gradients_of_examples,
    "Hessian-vector products": second_derivatives,
    "training": training,
    "state": state,
    "keys": keys,
}


def outcome_of(check: str, specimen: Specimen) -> Outcome:
    """Carry out a check by its name in `CHECKS`."""
    if check in specimen.not_asked:
        return Outcome("not asked", specimen.not_asked[check])
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # packages have many; torchleaf's own are in the text
        try:
            error = CHECKS[check](specimen)
        except NotAsked as exc:
            return Outcome("not asked", str(exc))
        except Wrong as exc:
            return Outcome("wrong", str(exc))
        except torchleaf.TorchCallError as exc:
            return Outcome("refused", _first_line(exc))
        except Exception as exc:  # whatever it is, it is the outcome
            return Outcome("error", _first_line(exc))
    ours = sorted({str(w.message).split(": ")[-1] for w in caught if "torchleaf" in str(w.message)})
    return Outcome("ok", "; ".join([f"{error:.0e}, {time.monotonic() - started:.0f} s", *ours]))


# --- help ----------------------------------------------------------------------------------------


def compare(actual: list[Any], expected: list[np.ndarray], what: str, tolerance: float = SINGLE) -> float:
    """The largest error, relative to the largest element of its array or a hundredth of the largest of all.

    `Wrong` beyond the tolerance.
    """
    if len(actual) != len(expected):
        raise Wrong(f"{what}: {len(actual)} arrays for {len(expected)}")
    largest, least = 0.0, 1e-2 * max((np.abs(e[np.isfinite(e)]).max(initial=0) for e in expected), default=0)
    for i, (a, e) in enumerate(zip(numpy_of(actual), expected, strict=True)):
        if a.shape != e.shape:
            raise Wrong(f"{what}: array {i} has shape {a.shape}, torch's {e.shape}")
        if not np.array_equal(np.isfinite(a), np.isfinite(e)):
            raise Wrong(f"{what}: array {i} is not finite where torch's is, or is where torch's is not")
        finite = np.isfinite(e)
        difference = np.abs(a[finite].astype(e.dtype) - e[finite]).max(initial=0)
        error = float(difference / (1e-6 + max(least, np.abs(e[finite]).max(initial=0))))
        if not error <= tolerance:
            raise Wrong(f"{what}: array {i} is off by {error:.1e}")
        largest = max(largest, error)
    return largest


def normal(rng: np.random.Generator, like: Any) -> np.ndarray:
    """Normal numbers of a shape and dtype, in both parts if it is complex."""
    drawn = rng.normal(size=like.shape)
    return (drawn + 1j * rng.normal(size=like.shape) if jnp.iscomplexobj(like) else drawn).astype(like.dtype)


def numpy_of_tensors(tensors: Any) -> list[np.ndarray]:
    """Copies."""
    return [to_numpy(x) for x in tensors]


@contextlib.contextmanager
def wide(enable: bool) -> Iterator[None]:
    """64-bit floats for a while, in JAX and for what modules make inside their forward."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if enable else before)
    try:
        with jax.enable_x64(enable):
            yield
    finally:
        torch.set_default_dtype(before)


def _what_torch_can(compute: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
    try:
        return compute()
    except (RuntimeError, NotImplementedError) as exc:
        raise NotAsked(f"torch cannot: {_first_line(exc)}") from exc


def _over_runs(specimen: Specimen, function_of: Callable[[Any], Callable[..., Any]]) -> float:
    """A function of either side, run as it is and then compiled, with other values each time."""
    ours = Ours(specimen)
    compiled = eqx.filter_jit(function_of(ours))

    def check(function: Callable[..., Any], number: int) -> float:
        torch_side = Torch(specimen)  # its state the first one
        expected = numpy_of_tensors(function_of(torch_side)(torch_side.arguments(number)))
        return compare(function(ours.params, *ours.arguments(number)), expected, f"run {number + 1}")

    return max([check(function_of(ours), 0), *(check(compiled, number) for number in range(RUNS))])


def _over_batch(specimen: Specimen, function_of: Callable[[Any], Callable[..., Any]]) -> float:
    """A function of either side, mapped over several examples by `vmap`, against a loop in torch."""
    if changes_state(specimen):
        raise NotAsked("examples cannot share state that each changes")
    torch_side, ours = Torch(specimen), Ours(specimen)
    leaves, tree = tree_flatten(specimen.arguments(0))
    is_batched = [isinstance(x, torch.Tensor) and specimen.batched(x) for x in leaves]
    if not any(is_batched):
        raise NotAsked("no argument to map over")
    others = [tree_flatten(specimen.arguments(number))[0] for number in range(1, EXAMPLES)]
    rows = [[row[i] if batched else leaves[i] for i, batched in enumerate(is_batched)] for row in (leaves, *others)]
    examples = [torch_side.differentiable(tree_unflatten(row, tree)) for row in rows]
    results = [numpy_of_tensors(function_of(torch_side)(example)) for example in examples]
    expected = [np.stack(arrays) for arrays in zip(*results, strict=True)]

    stacked = [
        torch.stack(column) if b else column[0] for column, b in zip(zip(*rows, strict=True), is_batched, strict=True)
    ]
    arrays, static = arrays_of(tree_unflatten(stacked, tree))
    axes = tree_unflatten([0 if b else None for b in is_batched], tree)
    mapped = jax.vmap(lambda params, arrays: function_of(ours)(params, arrays, static), in_axes=(None, axes))
    run = jax.jit(mapped)
    return max(compare(run(ours.params, arrays), expected, f"run {number + 1}") for number in range(RUNS))


def _slope(loss: Callable[[Any], Any], params: Any, smooth: bool) -> float:
    """The derivative along a direction by the gradient: against finite differences, or forward mode if not `smooth`."""
    leaves, treedef = jax.tree.flatten(params)
    rng, step = np.random.default_rng(1), 1e-6
    along = [normal(rng, x) for x in leaves]
    direction = jax.tree.unflatten(treedef, along)
    grads = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    slope = sum(jnp.sum(g * d).real for g, d in zip(grads, along, strict=True))
    if not smooth:
        forward = jax.jit(lambda params: jax.jvp(loss, (params,), (direction,))[1])(params)
        return compare([slope], [np.array(forward)], "slope for one key")
    run = jax.jit(loss)
    there, back = (run(jax.tree.map(lambda x, d, h=h: x + h * d, params, direction)) for h in (step, -step))
    return compare([slope], [np.array((there - back) / (2 * step))], "slope for one key", tolerance=DOUBLE)


def _first_line(exc: Exception) -> str:
    text = str(exc).strip()
    return f"{type(exc).__name__}: {text.splitlines()[0] if text else ''}"
