"""A replay keeps torch's checks: what torch refuses is refused in every run, and code that catches it goes on."""

import warnings

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from samples import as_torch
from torch import nn

RUNS = 5
AT_RUN_TIME = (RuntimeError, ValueError)
GOOD = jnp.array([[2.0, 0.5], [0.5, 1.0]])
BAD = {
    "indefinite": jnp.array([[1.0, 2.0], [2.0, 1.0]]),
    "singular": jnp.ones((2, 2)),
    "negative": -GOOD,
    "large": GOOD * 100,
}


def _asserted(x):
    torch._assert_async((x > 0).all(), "positive, please")
    return x.sqrt()


def _functionally_asserted(x):
    torch.ops.aten._functional_assert_async.msg((x > 0).all(), "positive, please", torch.zeros(()))
    return x.sqrt()


def _looked_up_for_nothing(x):
    torch.arange(5.0).gather(0, x.reshape(-1).long())
    return x * 2


def _embedded_for_nothing(x):
    nn.functional.embedding(x.long(), torch.zeros(5, 1))
    return x * 2


def _factorised_for_nothing(x):
    torch.linalg.cholesky(x)
    return x * 2


@torch.library.custom_op("torchleaf_tests::refuse_negative", mutates_args=())
def _refuse_negative(x: torch.Tensor) -> None:
    if bool((x < 0).any()):
        raise ValueError("negative values")


@_refuse_negative.register_fake
def _(x: torch.Tensor) -> None:
    return None


def _refused_by_a_custom_op(x):
    _refuse_negative(x)
    return x * 2


REFUSALS = {
    "cholesky": (torch.linalg.cholesky, "indefinite", "not positive-definite"),
    "inv": (torch.linalg.inv, "singular", "singular"),
    "solve": (lambda x: torch.linalg.solve(x, torch.ones(2)), "singular", "singular"),
    "lu": (lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), torch.eye(2)), "singular", "is zero"),
    "an unused factor": (_factorised_for_nothing, "indefinite", "not positive-definite"),
    "_assert_async": (_asserted, "negative", "positive, please"),
    "_functional_assert_async": (_functionally_asserted, "negative", "positive, please"),
    "an unused lookup": (_looked_up_for_nothing, "large", "out of bounds"),
    "an unused embedding": (_embedded_for_nothing, "large", "index out of range"),
    "a custom op": (_refused_by_a_custom_op, "negative", "negative values"),
}


@pytest.mark.parametrize("bad_runs", [[4], [2, 3], [0, 4], [1]], ids=str)
@pytest.mark.parametrize("name", REFUSALS)
def test_what_torch_refuses_is_refused_in_every_run(name, bad_runs):
    function, bad, message = REFUSALS[name]
    program = jax.jit(torchleaf.torch_function(function))
    with pytest.raises(Exception, match=message):
        function(as_torch(BAD[bad]))
    for run in range(RUNS):
        if run not in bad_runs:
            x = GOOD + run / 10
            assert_trees_close(program(x), from_torch(function(as_torch(x))), rtol=1e-5)
            continue
        with pytest.raises(AT_RUN_TIME, match=message):
            jax.block_until_ready(program(BAD[bad]))


@pytest.mark.parametrize("residuals", ["live", "recompute"])
@pytest.mark.parametrize("name", ["cholesky", "inv", "_assert_async", "a custom op"])
def test_gradients_of_what_torch_refuses(name, residuals):
    function, bad, message = REFUSALS[name]
    wrapped = torchleaf.torch_function(function, residuals=residuals)
    step = jax.jit(jax.grad(lambda x: wrapped(x).sum()))
    for run in range(RUNS):
        if run == 3:
            with pytest.raises(AT_RUN_TIME, match=message):
                jax.block_until_ready(step(BAD[bad]))
            continue
        x = GOOD + run / 10
        leaf = as_torch(x).requires_grad_()
        function(leaf).sum().backward()
        assert_trees_close(step(x), from_torch(leaf.grad), rtol=1e-4)


def safe_cholesky(x):
    try:
        return torch.linalg.cholesky(x)
    except torch.linalg.LinAlgError:
        return torch.linalg.cholesky(x + 4 * torch.eye(2))


def safe_lookup(x):
    try:
        return torch.arange(5.0).gather(0, x.reshape(-1).long())
    except RuntimeError:
        return x.reshape(-1) * 2


@pytest.mark.parametrize("first", [0, 1, 2, 3])
@pytest.mark.parametrize(("function", "bad"), [(safe_cholesky, "indefinite"), (safe_lookup, "large")])
def test_code_that_catches_what_torch_refuses(function, bad, first):
    """Whether the runs that are written down are those that torch refuses, or the later ones."""
    wrapped = torchleaf.torch_function(function)
    programs = [jax.jit(wrapped), jax.jit(jax.vmap(torchleaf.torch_function(function, vmap_method="loop")))]
    for run in range(2 * RUNS):
        x = BAD[bad] if (run // 2 + first) % 4 < 2 else GOOD + run / 10
        expected = from_torch(function(as_torch(x)))
        assert_trees_close(programs[0](x), expected, rtol=1e-5)
        assert_trees_close(programs[1](x[None])[0], expected, rtol=1e-5)


# --- constants that cannot be compared ---------------------------------------------------------------


@pytest.fixture
def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), {nn.Linear}
        )


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_quantized_modules(quantized):
    model = torchleaf.TorchModule(quantized)
    program = jax.jit(lambda x: model(x))
    for run in range(RUNS):
        x = jnp.linspace(-1, 1, 16).reshape(2, 8) + run
        assert_trees_close(program(x), from_torch(quantized(as_torch(x))), rtol=1e-5)


def test_dtypes_and_layouts_are_compared():
    """Things that are made anew for each run, but equal, do not stand in the way of a replay."""
    runs = []

    def function(x):
        runs.append(type(x))
        y = x.to(torch.float16, memory_format=torch.preserve_format).to(torch.float32)
        return y + torch.zeros_like(y, device=torch.device("cpu"), layout=torch.strided)

    program = jax.jit(torchleaf.torch_function(function))
    for run in range(RUNS):
        assert_trees_close(program(GOOD + run), GOOD + run, rtol=1e-3)
    assert len(runs) < RUNS + 1
