"""Operands whose dtypes torch's kernels refuse to mix are refused, and those that they mix are not."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
import torchleaf
from compare import assert_trees_close, from_torch

pytestmark = pytest.mark.all_cases
WIDE, ROW, INDEX = torch.randn(3, 3).double(), torch.randn(3), torch.tensor([0, 2, 1])

REFUSED = {
    "mm": lambda x: x @ WIDE,
    "mv": lambda x: WIDE @ x[0],
    "addmm": lambda x: torch.addmm(x, WIDE, WIDE),
    "linear": lambda x: F.linear(x, WIDE),
    "baddbmm": lambda x: torch.baddbmm(x[None], WIDE[None], WIDE[None]),
    "dot": lambda x: torch.dot(x[0], WIDE[0]),
    "conv": lambda x: F.conv1d(x[None], WIDE[..., None]),
    "conv_transpose": lambda x: F.conv_transpose1d(x[None], WIDE[..., None]),
    "layer_norm": lambda x: F.layer_norm(x, (3,), WIDE[0]),
    "batch_norm": lambda x: F.batch_norm(x, WIDE[0], WIDE[1].abs()),
    "cross": lambda x: torch.linalg.cross(x, WIDE),
    "index_copy": lambda x: x.index_copy(0, INDEX, WIDE),
    "index_add": lambda x: x.index_add(0, INDEX, WIDE),
    "index_put": lambda x: torch.index_put(x, (INDEX,), WIDE),
    "setitem": lambda x: torch.Tensor.__setitem__(x.clone(), INDEX, WIDE),
    "nll_loss": lambda x: F.nll_loss(x, INDEX, WIDE[0]),
    "grid_sample": lambda x: F.grid_sample(x[None, None], WIDE[:2, :2][None, None], align_corners=False),
    "complex": lambda x: torch.complex(x, WIDE),
}
MIXED = {
    "sum": lambda x: x + WIDE,
    "where": lambda x: torch.where(x > 0, x, WIDE),
    "layer_norm of half": lambda x: F.layer_norm(x.bfloat16(), (3,), ROW).float(),
    "matrix of half": lambda x: (x.bfloat16() @ WIDE.bfloat16()).float(),
}


@pytest.mark.parametrize("fn", REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused(fn, x64):
    x = torch.randn(3, 3)
    with pytest.raises(RuntimeError):
        fn(x)
    ours = torchleaf.torch_function(fn, engine="xla")
    with pytest.raises(torchleaf.TorchCallError, match=r"(?s)failed on operands \(x: float32\[3, 3\]\).*torch said"):
        jax.eval_shape(ours, from_torch(x))


@pytest.mark.parametrize("fn", MIXED.values(), ids=MIXED)
def test_what_torch_mixes_is_mixed(fn, x64):
    x = torch.randn(3, 3)
    ours = torchleaf.torch_function(fn, engine="xla", strict=True)
    assert_trees_close(ours(from_torch(x)), from_torch(fn(x)), rtol=1e-2, atol=1e-2)


def test_an_integer_is_no_number_for_a_matrix():
    with pytest.raises(torchleaf.TorchCallError, match=r"(?s)failed on operands.*self: float32, mat2: int64"):
        torchleaf.torch_function(lambda x, w: x @ w, engine="xla")(jnp.ones((2, 3)), jnp.ones((3, 2), jnp.int32))
