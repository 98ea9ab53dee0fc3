"""torch's own operator database: every operator in every transformation, eager and compiled, against torch itself.

What torch itself cannot do is not applicable, with a reason, of which only a few kinds are allowed; the tests list them
(`pytest -s`). Nothing else may fail.
"""

import collections
import functools
import re
import warnings

import pytest
import torch

pytestmark = pytest.mark.long

ALLOWED = (
    "draws random numbers",
    "uninitialised memory",
    "sparse operands",
    "JAX has dense arrays only",
    "has no JAX counterpart",
    "a tensor whose shape depends on values",
    "reads values of its operands",
    "not differentiable there",
    r"torch: it runs on GPUs only",
    r"torch: .*is not implemented",
    r"torch: .*once_differentiable",
    r"torch: .*not differentiable",
    r"torch: .*does not require grad",
    r"torch: .*(don't|does not) support automatic differentiation",
)
"""Why torch itself, or JAX, has no answer."""

CHOSEN = [
    "__getitem__",
    "__rpow__",
    "addmm",
    "amax",
    "as_strided",
    "atan2",
    "cat",
    "cholesky_inverse",
    "cholesky_solve",
    "clamp",
    "copysign",
    "cummax",
    "cumprod",
    "diagonal_scatter",
    "einsum",
    "fmod",
    "gather",
    "index_fill",
    "index_put",
    "lerp",
    "linalg.det",
    "linalg.eigh",
    "linalg.inv",
    "linalg.norm",
    "linalg.slogdet",
    "linalg.solve",
    "linalg.solve_triangular",
    "log_softmax",
    "logcumsumexp",
    "logsumexp",
    "masked.softmax",
    "masked_fill",
    "matrix_exp",
    "max.reduction_with_dim",
    "median",
    "native_batch_norm",
    "native_layer_norm",
    "nn.functional.batch_norm",
    "nn.functional.conv2d",
    "nn.functional.huber_loss",
    "nn.functional.layer_norm",
    "nn.functional.linear",
    "nn.functional.max_pool2d",
    "nn.functional.mse_loss",
    "nn.functional.softplus",
    "norm",
    "pow",
    "prod",
    "scatter_reduce.prod",
    "sgn",
    "sort",
    "std_mean",
    "svd",
    "take_along_dim",
    "where",
    "xlogy",
]
"""A few of each family, and those of which torch has a rule wrong."""


def operators(dtype):
    """Those of torch's database, by name; to import it takes seconds."""
    from op_database import name_of, operators

    return {name_of(op): op for op in operators(dtype)}


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames:
        is_asked_for = "slow" in metafunc.config.option.markexpr.replace("not slow", "")
        dtypes = (torch.float64, torch.complex128) if is_asked_for else ()
        every = [(dtype, name) for dtype in dtypes for name in operators(dtype)]
        metafunc.parametrize(("dtype", "name"), every, ids=[f"{name}-{dtype}" for dtype, name in every])


@pytest.fixture(scope="module")
def listed():
    """Prints, at the end, what was not applicable."""
    found = collections.defaultdict(set)
    yield found
    print(f"\n{len(found)} reasons why torch itself cannot do something:")
    for reason, names in sorted(found.items()):
        print(f"- {reason}: {', '.join(sorted(names))}")


def check(name, dtype, most, listed):
    """All transformations of a few samples."""
    from op_checks import outcomes

    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of single operators
        found = list(outcomes(operators(dtype)[name], dtype, most))
    for outcome in found:
        if outcome.wrong:
            wrong.append(f"sample {outcome.sample}, {outcome.transformation}: {outcome.wrong}")
        elif outcome.not_applicable:
            assert any(re.search(reason, outcome.not_applicable) for reason in ALLOWED), outcome
            listed[outcome.not_applicable].add(name)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_operators(name, x64, listed):
    check(name, torch.float64, 1, listed)


@pytest.mark.slow
def test_every_operator(name, dtype, x64, listed):
    check(name, dtype, 3, listed)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [torch.float64, torch.complex128])
def test_operators_in_a_mode_are_what_they_are_outside(numbers):
    """Modes see traces, first runs and recordings; in plain ones of torch's some operators are others."""
    from op_database import cases, is_inexact
    from torchleaf.interop.modes.dispatch import Mode

    def results(function, operands):
        torch.manual_seed(0)
        outs = function(*(x.clone() for x in operands))
        return [y.resolve_conj() for y in outs if is_inexact(y) and y.layout == torch.strided]

    n_tried = 0
    for name, op in operators(numbers).items():
        if op.name.startswith(("empty", "new_empty", "jiterator")):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for case in cases(op, numbers, 1):
                try:
                    expected = results(case.function, case.operands)
                except NotImplementedError:
                    continue
                with Mode():
                    actual = results(case.function, case.operands)
                assert all(map(functools.partial(torch.allclose, equal_nan=True), actual, expected)), name
                n_tried += 1
    assert n_tried > 200
