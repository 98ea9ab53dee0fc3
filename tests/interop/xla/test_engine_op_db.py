"""torch's operator database computed by XLA, with no op that torch computes: every transformation, against torch."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import torch

pytestmark = pytest.mark.long

CHOSEN = [
    "addmm",
    "amax",
    "atan2",
    "cat",
    "clamp",
    "combinations",
    "cummax",
    "cumprod",
    "diagonal_scatter",
    "digamma",
    "einsum",
    "fft.rfft",
    "floor_divide",
    "gather",
    "geqrf",
    "grid_sampler_3d",
    "hash_tensor",
    "index_put",
    "lerp",
    "linalg.cholesky",
    "linalg.solve",
    "logsumexp",
    "median",
    "nn.functional.adaptive_avg_pool2d",
    "nn.functional.avg_pool2d",
    "nn.functional.batch_norm",
    "nn.functional.conv2d",
    "nn.functional.conv_transpose2d",
    "nn.functional.grid_sample",
    "nn.functional.interpolate.bilinear",
    "nn.functional.layer_norm",
    "nn.functional.max_pool2d",
    "nn.functional.pad.reflect",
    "nextafter",
    "pow",
    "remainder",
    "resize_",
    "scatter_reduce.amax",
    "sort",
    "std",
    "where",
]
"""One of each kind."""

MISSING = ["linalg.eig", "linalg.eigvals", "linalg.ldl_factor", "linalg.ldl_factor_ex", "linalg.ldl_solve"]
"""Operators with ops that JAX has no function for: torch computes them."""

WRONG = {
    **dict.fromkeys(
        ["as_strided_scatter", *(f"nn.functional.max_unpool{n}d" for n in (1, 2, 3))],
        "samples write to one place several times, of which torch leaves the derivative undefined",
    ),
    "to_sparse": "JAX has dense arrays only",
}
"""Operators that are not right yet, or cannot be."""

TORCHS = {
    torch.float32: {"logcumsumexp": "torch's gradient is off by a thousandth"},
    torch.bfloat16: {
        "logcumsumexp": "torch's gradient is wrong",
        "nn.functional.grid_sample": "torch's gradient is wrong in its first digit",
    },
}
"""Operators of lower precision whose derivatives are nearer to those of double precision here than torch's are."""
FIRST = ("forward", "gradient", "jvp", "vmap")


@functools.cache
def _operators(dtype=torch.float64):
    from op_database import name_of, operators

    return {name_of(op): op for op in operators(dtype)}


def _outcomes(name, dtype=torch.float64, transformations=(), samples=1):
    from op_checks import outcomes

    with jax.enable_x64(True):
        return list(outcomes(_operators(dtype)[name], dtype, samples, transformations, engine="xla", strict=True))


def _wrong(found):
    return [f"{o.operator} {o.transformation}: {o.wrong}" for o in found if o.wrong]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_operators(name):
    found = _outcomes(name)
    assert found
    assert not _wrong(found)


OTHERWISE = ["_native_batch_norm_legit", "div.floor_rounding", "floor_divide", "nn.functional.group_norm", "renorm"]
"""Operators of which another sample than the first goes another way: in evaluation, other numbers of axes, no rows."""


@pytest.mark.all_cases
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERWISE)
def test_further_samples(name):
    found = _outcomes(name, transformations=["forward", "gradient"], samples=8)
    assert len(found) >= 7
    assert not _wrong(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named(name):
    assert any("for which engine='xla' has no JAX function" in text for text in _wrong(_outcomes(name)))


@pytest.mark.all_cases
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_values_of_every_operator(part):
    names = [n for n in _operators() if n not in (*MISSING, "to_sparse") and not n.startswith("jiterator")]
    wrong = [text for name in names[part::4] for text in _wrong(_outcomes(name, torch.float64, ["forward"]))]
    assert len(wrong) == 0, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_operator():
    names = [n for n in _operators() if n not in MISSING and n not in WRONG and not n.startswith("jiterator")]
    wrong = [text for name in names for text in _wrong(_outcomes(name))]
    assert len(wrong) == 0, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.all_cases
@pytest.mark.parametrize("dtype", TORCHS, ids=str)
def test_every_operator_in_lower_precision(dtype):
    left_out = {*MISSING, *WRONG, *TORCHS[dtype]}
    names = [n for n in _operators(dtype) if n not in left_out and not n.startswith("jiterator")]
    wrong = [text for name in names for text in _wrong(_outcomes(name, dtype, FIRST))]
    assert len(wrong) == 0, "\n".join(wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", TORCHS, ids=str)
@pytest.mark.parametrize("name", ["baddbmm", "matrix_exp", "nn.functional.instance_norm"])
def test_chosen_operators_in_lower_precision(name, dtype):
    found = _outcomes(name, dtype, FIRST)
    assert found
    assert not _wrong(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_has_the_table_of_operators():
    root = Path(__file__).parents[3]
    program = [sys.executable, "-W", "ignore", root / "tests" / "engine_page.py"]  # without type checks, as users run
    found = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert found in (root / "docs" / "xla_engine.md").read_text()
