"""The checks of first order: values, gradients, forward mode, batches, state. Each returns the largest error."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import torch

from ...interop.values.trees import flatten_registering
from .bench import STEP, Bench, torch_cannot, what_torch_can, wide
from .jax_side import arrays_of
from .numbers import DOUBLE, NotAskedError, compare, numpy_of_tensors, size_of
from .torch_side import Torch, state_of

RUNS, EAGER_RUNS = 5, 2
"""The first two runs of a compiled call are recorded, those that follow replay it."""
EXAMPLES = 3


def forward(bench: Bench) -> float:
    """Outputs, as they are and compiled, each run with other values."""
    return _over_runs(bench, lambda side: side.outputs)


def gradients(bench: Bench) -> float:
    """Gradients by parameters and arguments, as they are and compiled, each run with other values."""
    bench.check_differentiable()
    return _over_runs(bench, lambda side: side.gradients, is_gradient=True)


def forward_mode(bench: Bench) -> float:
    """Jacobian-vector products: `<ct, J t> = <J^T ct, t>` with torch's gradients, and torch's finite differences."""
    if not bench.subject.forward_mode:
        raise NotAskedError("forward_mode=False")
    bench.check_differentiable()
    side = bench.torch()
    args = side.arguments(0)
    with torch_cannot(lambda: side.forward_mode(args, bench.direction(side, args))):
        error = _slopes(bench)
    return max(error, _pushed(bench) if bench.is_plain else 0.0)


def _slopes(bench: Bench) -> float:
    ours, torch_side = bench.ours(), bench.torch()
    direction = bench.direction(torch_side, torch_side.arguments(0))
    compiled = eqx.filter_jit(ours.slope)

    def check(slope: Callable[..., Any], number: int) -> float:
        side = bench.torch()  # its state the first one
        grads = what_torch_can(lambda: numpy_of_tensors(side.gradients(side.arguments(number))))
        expected = sum(float((g.conj() * d).sum().real) for g, d in zip(grads, direction, strict=True))
        actual = slope(ours.params, *ours.arguments(number), list(direction))
        return compare([actual], [np.array(expected)], f"run {number + 1}", bench.tolerance, least=size_of(grads))

    return max([check(ours.slope, 0), *(check(compiled, number) for number in range(RUNS))])


def _pushed(bench: Bench) -> float:
    """The derivative of every output, in float64."""
    with wide(True):
        ours, side = bench.ours(double=True), bench.torch(double=True)
        args = side.arguments(0)
        direction = bench.direction(side, args)
        # The weighted sum, for which smoothness is known, may leave out what jumps: whole numbers.
        expected = side.differences(side.inexact_outputs, args, direction, STEP)
        pushed = eqx.filter_jit(ours.pushed)(ours.params, *ours.arguments(0), direction)
        return compare(pushed, expected, "in float64", DOUBLE)


def batches(bench: Bench) -> float:
    """`vmap` over arguments, compiled, against a loop."""
    return _over_batch(bench, lambda side: side.outputs)


def gradients_of_examples(bench: Bench) -> float:
    """`vmap` of gradients, compiled, against a loop."""
    bench.check_differentiable()
    return _over_batch(bench, lambda side: side.gradients)


def state(bench: Bench) -> float:
    """Outputs and buffers over several calls, each with the state that the one before left."""
    if not bench.changes_state:
        raise NotAskedError("no state: a call changes no buffers")
    torch_side, ours = bench.torch(), bench.ours()
    state, run, error = ours.state, eqx.filter_jit(ours.call), 0.0
    for number in range(RUNS):
        outputs, state = run(ours.params, *ours.arguments(number), state)
        expected = numpy_of_tensors(torch_side.outputs(torch_side.arguments(number)))
        error = max(error, compare(outputs, expected, f"run {number + 1}", bench.tolerance))
    buffers, expected = ours.wrapped.buffers(state), state_of(torch_side.module)
    expected = {name: value for name, value in expected.items() if name in buffers}  # not caches that the calls made
    names = [f"buffer `{name}`" for name in expected]
    actual = [buffers[name] for name in expected]
    return max(error, compare(actual, list(expected.values()), "state", bench.tolerance, names=names))


def _over_runs(bench: Bench, function_of: Callable[[Any], Callable[..., Any]], *, is_gradient: bool = False) -> float:
    """A function of either side, run as it is and then compiled, with other values each time."""
    ours = bench.ours()
    compiled = eqx.filter_jit(function_of(ours))

    def check(function: Callable[..., Any], number: int, how: str) -> float:
        side = bench.torch()  # its state the first one
        args = side.arguments(number)
        expected = what_torch_can(lambda: numpy_of_tensors(function_of(side)(args)))
        names = side.names(args) if is_gradient else [f"output {i}" for i in range(len(expected))]
        actual = function(ours.params, *ours.arguments(number))
        return compare(actual, expected, f"{how}, run {number + 1}", bench.tolerance, names=names)

    errors = [check(function_of(ours), number, "eager") for number in range(EAGER_RUNS)]
    return max([*errors, *(check(compiled, number, "compiled") for number in range(RUNS))])


def _over_batch(bench: Bench, function_of: Callable[[Any], Callable[..., Any]]) -> float:
    """A function of either side, mapped over several examples by `vmap`, against a loop in torch."""
    if bench.changes_state:
        raise NotAskedError("examples cannot share state that each changes")
    subject, torch_side, ours = bench.subject, bench.torch(), bench.ours()
    rows = [flatten_registering(subject.arguments(number)) for number in range(EXAMPLES)]
    (first, tree), is_batched = rows[0], [isinstance(x, torch.Tensor) and subject.batched(x) for x in rows[0][0]]
    if not any(is_batched):
        raise NotAskedError("no argument to map over")
    examples = [[x if b else y for x, y, b in zip(row, first, is_batched, strict=True)] for row, _ in rows]
    results = [
        what_torch_can(lambda e=e: numpy_of_tensors(_result(torch_side, function_of, jax.tree.unflatten(tree, e))))
        for e in examples
    ]
    expected = [np.stack(arrays) for arrays in zip(*results, strict=True)]
    columns = zip(zip(*examples, strict=True), is_batched, strict=True)
    arrays, static = arrays_of(jax.tree.unflatten(tree, [torch.stack(x) if b else x[0] for x, b in columns]))
    axes = jax.tree.unflatten(tree, [0 if b else None for b in is_batched])
    mapped = jax.vmap(lambda params, arrays: function_of(ours)(params, arrays, static), in_axes=(None, axes))
    run = jax.jit(mapped)
    return max(
        compare(run(ours.params, arrays), expected, f"run {number + 1}", bench.tolerance) for number in range(RUNS)
    )


def _result(side: Torch, function_of: Callable[[Any], Callable[..., Any]], args: tuple[Any, ...]) -> Any:
    return function_of(side)(side.differentiable(args))
