"""What a `torch_function` returns: every output, tensor or not, in the structure torch gave it."""

import jax
import jax.numpy as jnp
import pytest
import torch
from compare import assert_trees_close, eager_and_jit, from_torch
from samples import as_torch
from torchleaf import torch_function
from transformers.modeling_outputs import BaseModelOutput

pytestmark = pytest.mark.both_engines(every=4)
X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5


def test_outputs_that_are_not_tensors_are_kept():
    def describe(x):
        return {
            "y": x + 1,
            "none": None,
            "flag": True,
            "count": x.ndim,
            "scale": 0.5,
            "z": 2j,
            "name": "encoder",
            "raw": b"x",
            "dtype": x.dtype,
            "device": x.device,
            "shape": x.shape,
            "nested": [("a", x.sum()), []],
        }

    got = torch_function(describe)(X)
    expected = {k: v for k, v in describe(as_torch(X)).items() if k not in ("y", "nested")}
    assert {k: (type(got[k]), got[k]) for k in expected} == {k: (type(v), v) for k, v in expected.items()}
    assert got.keys() - expected.keys() == {"y", "nested"}
    assert_trees_close(got["y"], X + 1)
    assert_trees_close(got["nested"], [("a", X.sum()), []])
    arrays = jax.jit(
        lambda x: jax.tree.map(lambda v: v if isinstance(v, jax.Array) else None, torch_function(describe)(x))
    )
    assert_trees_close(arrays(X)["y"], X + 1)


@eager_and_jit
def test_return_types(jit):
    got = jit(lambda x: torch_function(torch.max)(x, dim=1))(X)
    assert type(got) is torch.return_types.max
    assert_trees_close(tuple(got), (X.max(1), X.argmax(1)))


@eager_and_jit
def test_model_output(jit):
    @torch_function
    def encode(x):
        return BaseModelOutput(last_hidden_state=x * 2, hidden_states=(x, x + 1))

    got = jit(encode)(X)
    assert isinstance(got, BaseModelOutput)
    assert_trees_close(got.last_hidden_state, 2 * X)
    assert_trees_close(got.hidden_states, (X, X + 1))
    assert got.attentions is None
    again = jit(lambda out: torch_function(lambda o: o.last_hidden_state + o["hidden_states"][1])(out))(got)
    assert_trees_close(again, 3 * X + 1)


@eager_and_jit
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x,
        lambda x: (x, x),
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(4, 3),
        lambda x: x.flip(0),
        lambda x: torch.complex(x, -x).conj(),
        lambda x: torch.complex(x, -x).conj().imag,
        lambda x: x[:0],
        lambda x: x.sum(),
        lambda x: torch.nn.Parameter(x * 2),
        lambda x: torch.zeros(3),
        lambda x: [],
        lambda x: x.to(memory_format=torch.contiguous_format).view(3, 2),
    ],
    ids=lambda fn: None,
)
def test_output_layout(fn, jit):
    assert_trees_close(jit(torch_function(fn))(X), from_torch(fn(as_torch(X))))


@eager_and_jit
def test_no_arrays_at_all(jit):
    assert_trees_close(jit(lambda: torch_function(torch.arange)(3.0))(), jnp.arange(3.0))
    assert torch_function(lambda name: (name, None))("s") == ("s", None)
