"""The checks that need more than torch's gradients: finite differences, second derivatives, random numbers."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .bench import STEP, Bench, torch_cannot, what_torch_can, wide
from .checks import RUNS
from .cuts import cuts_of
from .jax_side import Ours, weighted_sum
from .numbers import (
    DOUBLE,
    NotAskedError,
    WrongError,
    compare,
    normal,
    numpy_of,
    numpy_of_tensors,
    size_of,
)


def finite_differences(bench: Bench) -> float:
    """Gradients in float64: those of either side are the same, and the derivatives of torch's outputs."""
    bench.check_differentiable()
    if bench.subject.smooth is False:
        raise NotAskedError("finite differences do not tell its derivatives")
    slopes, error = bench.slopes, 0.0
    if bench.smooth:
        with wide(True):
            side, ours = bench.torch(double=True), bench.ours(double=True)
            args = side.arguments(0)
            actual = eqx.filter_jit(ours.gradients)(ours.params, *ours.arguments(0))
            expected = numpy_of_tensors(side.gradients(args))
            error = compare(actual, expected, "gradient in float64", DOUBLE, names=side.names(args))
    if slopes.off <= DOUBLE:
        return max(error, slopes.off)
    if not slopes.is_settled:
        raise NotAskedError("finite differences do not settle: it computes in float32, rounds or jumps")
    cuts = cuts_of(bench.subject)
    if cuts:
        raise NotAskedError(f"its gradients are not meant to be its derivatives: it uses {', '.join(cuts)}")
    raise WrongError(
        f"torch's own gradient is not the derivative of its forward: along a direction {slopes.by_gradient:.6g}, by "
        f"finite differences {slopes.by_differences[1]:.6g}. The backward of a torch.autograd.Function, or a hook, "
        "gives something else"
    )


def second_derivatives(bench: Bench) -> float:
    """Hessian-vector products, forward over reverse and reverse over reverse."""
    bench.check_differentiable()
    with wide(bench.smooth):
        torch_side, ours = bench.torch(double=bench.smooth), bench.ours(double=bench.smooth)
        arrays, static = ours.arguments(0)
        floats, others = eqx.partition(arrays, eqx.is_inexact_array)
        point, treedef = jax.tree.flatten((ours.params, floats))
        args = torch_side.arguments(0)
        direction = [d.astype(x.dtype) for d, x in zip(bench.direction(torch_side, args), point, strict=True)]
        if bench.smooth:
            expected = torch_side.differences(torch_side.gradients, args, direction, STEP)
        else:
            expected = what_torch_can(lambda: torch_side.double_backward(args, direction))
        tolerance, names = DOUBLE if bench.smooth else bench.tolerance, torch_side.names(args)

        def gradients(*point: Any) -> list[Any]:
            params, floats = jax.tree.unflatten(treedef, point)
            return ours.gradients(params, eqx.combine(floats, others), static)

        def forward_over_reverse(*point: Any) -> Any:
            return jax.jvp(gradients, point, tuple(direction))[1]

        def reverse_over_reverse(*point: Any) -> Any:
            return [jnp.conj(p) for p in jax.vjp(gradients, *point)[1]([jnp.conj(d) for d in direction])]

        def by_torch() -> None:
            torch_side.double_backward(torch_side.arguments(0), direction)
            if bench.is_cut:
                raise NotAskedError("torch cannot: its double backward is not the derivative of its gradient")

        products = (forward_over_reverse, reverse_over_reverse)
        with torch_cannot(by_torch):
            return max(
                _over_runs(jax.jit(product), point, expected, product.__name__.replace("_", " "), tolerance, names)
                for product in (products if bench.subject.forward_mode else products[1:])
            )


def _over_runs(
    run: Callable[..., Any], point: list[Any], expected: Any, what: str, tolerance: float, names: list[str]
) -> float:
    return max(compare(run(*point), expected, what, tolerance, names=names) for _ in range(3))


def keys(bench: Bench) -> float:
    """Same key, same numbers; other keys, others; the gradient is that of the forward's numbers; examples by keys."""
    subject = bench.subject
    if not subject.random:
        raise NotAskedError("draws no random numbers")
    smooth = subject.cannot_compare is None and bench.is_plain
    with wide(smooth):
        ours = bench.ours(double=smooth, drawing=True)
        arrays, static = ours.arguments(0)
        key, *others = jax.random.split(subject.key(), _MANY)

        def outputs(params: Any, key: Any) -> list[Any]:
            return ours.outputs(params, arrays, static, key)

        run = jax.jit(outputs)
        first = numpy_of(run(ours.params, key))
        error = 0.0
        for _ in range(RUNS - 1):
            error = max(error, compare(run(ours.params, key), first, "the same key", bench.tolerance))
        error = max(error, compare(outputs(ours.params, key), first, "the same key, eager", bench.tolerance))
        if all(_are_equal(first, numpy_of(run(ours.params, other))) for other in others):
            raise WrongError("other keys give the same numbers")
        floats, rest = eqx.partition(arrays, eqx.is_inexact_array)

        def loss(point: Any) -> Any:
            params, floats = point
            return weighted_sum(ours.outputs(params, eqx.combine(floats, rest), static, key))

        if jax.tree.leaves((ours.params, floats)):
            side = bench.torch(double=smooth, drawing=True)
            with torch_cannot(lambda: side.gradients(side.arguments(0))):
                error = max(error, _slope(loss, (ours.params, floats), smooth, bench))
        return max(error, _over_keys(bench, ours, outputs, others[:3]))


_MANY = 50
"""Of so many keys one gives other numbers, even if they decide about little."""


def _over_keys(bench: Bench, ours: Ours, outputs: Callable[..., Any], keys: list[Any]) -> float:
    """Each example of a batch draws from its own key."""
    if ours.state is not None:
        return 0.0
    run = jax.jit(outputs)
    each = [numpy_of(run(ours.params, key)) for key in keys]
    mapped = jax.jit(jax.vmap(outputs, in_axes=(None, 0)))(ours.params, jnp.stack(keys))
    return compare(mapped, [np.stack(x) for x in zip(*each, strict=True)], "vmap over keys", bench.tolerance)


def _are_equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def _slope(loss: Callable[[Any], Any], point: Any, smooth: bool, bench: Bench) -> float:
    """The derivative along a direction by the gradient: against finite differences, or forward mode if not `smooth`."""
    leaves, treedef = jax.tree.flatten(point)
    rng, step = np.random.default_rng(1), 1e-6
    along = [normal(rng, x) for x in leaves]
    direction = jax.tree.unflatten(treedef, along)
    grads = jax.tree.leaves(jax.jit(jax.grad(loss))(point))
    slope = sum(jnp.sum(g * d).real for g, d in zip(grads, along, strict=True))
    least = size_of(numpy_of(grads))
    if smooth:
        run = jax.jit(loss)
        there, back = (run(jax.tree.map(lambda x, d, h=h: x + h * d, point, direction)) for h in (step, -step))
        expected = np.array((there - back) / (2 * step))
        return compare([slope], [expected], "slope for one key", DOUBLE, least=least)
    if not bench.subject.forward_mode:
        return 0.0
    forward = jax.jit(lambda point: jax.jvp(loss, (point,), (direction,))[1])(point)
    return compare([slope], [np.array(forward)], "slope for one key", bench.tolerance, least=least)
