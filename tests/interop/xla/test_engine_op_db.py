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
    "cummax",
    "cumprod",
    "diagonal_scatter",
    "digamma",
    "einsum",
    "fft.rfft",
    "floor_divide",
    "gather",
    "grid_sampler_3d",
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


@functools.cache
def _operators():
    from op_database import name_of, operators

    return {name_of(op): op for op in operators(torch.float64)}


def _wrong(name):
    from op_checks import outcomes

    with jax.enable_x64(True):
        found = list(outcomes(_operators()[name], torch.float64, 1, engine="xla", strict=True))
    assert found
    return [f"{o.operator} {o.transformation}: {o.wrong}" for o in found if o.wrong]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_operators(name):
    assert not _wrong(name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named(name):
    assert any("for which engine='xla' has no JAX function" in text for text in _wrong(name))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_operator():
    names = [n for n in _operators() if n not in MISSING and n not in WRONG and not n.startswith("jiterator")]
    wrong = [text for name in names for text in _wrong(name)]
    assert len(wrong) == 0, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_has_the_table_of_operators():
    root = Path(__file__).parents[3]
    program = [sys.executable, "-W", "ignore", root / "tests" / "engine_page.py"]  # without type checks, as users run
    found = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert found in (root / "docs" / "xla_engine.md").read_text()
