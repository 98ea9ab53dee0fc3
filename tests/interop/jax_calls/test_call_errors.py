"""What is refused, and that the error names the argument and the remedy."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from torch._subclasses.fake_tensor import FakeTensorMode


def double(x, *, weights=None):
    return x * 2 if weights is None else x * weights["a"]


f = torchleaf.jax_function(double)
BAD = {
    "float64": (
        lambda: f(torch.ones(2, dtype=torch.float64)),
        TypeError,
        r"double: x is torch.float64.*jax_enable_x64",
    ),
    "nested": (
        lambda: f(torch.ones(2), weights={"a": torch.ones(2, dtype=torch.float64)}),
        TypeError,
        r"weights\['a'\] is torch.float64",
    ),
    "complex128": (lambda: f(torch.ones(2, dtype=torch.complex128)), TypeError, r"`\.to\(torch\.complex64\)`"),
    "meta": (lambda: f(torch.ones(2, device="meta")), TypeError, r"x is a meta tensor of shape \(2,\).*to_empty"),
    "sparse": (lambda: f(torch.eye(2).to_sparse()), TypeError, r"x is of layout torch.sparse_coo.*\.to_dense\(\)"),
    "quantized": (
        lambda: f(torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)),
        TypeError,
        r"x is of layout.*\.dequantize\(\)",
    ),
    "unhashable": (
        lambda: f(torch.ones(2), weights=bytearray(b"a")),
        TypeError,
        "weights is a bytearray.*nor hashable",
    ),
    "no function": (lambda: torchleaf.jax_function(3), TypeError, "jax_function: fn is 3, which cannot be called"),
    "output": (
        lambda: torchleaf.jax_function(lambda x: {"a": [x, "text"]})(torch.ones(2)),
        torchleaf.JaxCallError,
        r"output\['a'\]\[1\] of .*lambda.* is 'text' of type str",
    ),
    "raises": (
        lambda: torchleaf.jax_function(lambda x, y: x @ y)(torch.ones(2, 3), torch.ones(2, 3)),
        torchleaf.JaxCallError,
        r"lambda.* raised TypeError: dot_general.*\(float32\[2,3\], float32\[2,3\]\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::UserWarning")  # quantized tensors are deprecated
def test_refused(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_operands_on_two_devices():
    """Fake tensors are on any."""
    with FakeTensorMode():
        x, other = torch.ones(2), torch.ones(2, device="cuda")
        with pytest.raises(ValueError, match=r"double: x is on cpu, but weights\['a'\] on cuda.*\.to\(device\)"):
            f(x, weights={"a": other})


def test_traced_values():
    with pytest.raises(TypeError, match=r"double: x is a traced JAX value.*float32\[2\].*torch_function"):
        jax.jit(lambda x: f(x))(jnp.ones(2))


def test_a_leaked_tracer_is_named():
    leaked = []
    jax.jit(lambda x: leaked.append(x) or x)(jnp.ones(2))

    def leaks(x):
        return x + leaked[0]

    with pytest.raises(torchleaf.JaxCallError, match="leaks raised UnexpectedTracerError"):
        torchleaf.jax_function(leaks)(torch.ones(2))


def test_an_exception_keeps_its_cause():
    def fails(x):
        raise KeyError("what is missing")

    with pytest.raises(torchleaf.JaxCallError, match="fails raised KeyError: 'what is missing'") as caught:
        torchleaf.jax_function(fails)(torch.ones(2))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_no_forward_mode_says_so():
    @jax.custom_vjp
    def g(x):
        return x

    g.defvjp(lambda x: (x, None), lambda _, ct: (ct,))
    with pytest.raises(torchleaf.JaxCallError, match=r"the JVP of .*can't apply forward-mode autodiff"):
        torch.func.jvp(torchleaf.jax_function(lambda x: g(x)), (torch.ones(2),), (torch.ones(2),))


def test_an_error_leaves_the_function_usable():
    h = torchleaf.jax_function(lambda x: x.reshape(4))
    with pytest.raises(torchleaf.JaxCallError):
        h(torch.ones(3))
    assert h(torch.ones(2, 2)).shape == (4,)
