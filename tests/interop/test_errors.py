"""What a `torch_function` refuses before it runs, naming the callable, the argument or output, and the remedy."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close
from torchleaf import RandomnessError, TorchCallError, torch_function

pytestmark = pytest.mark.both_engines(every=4)
X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5


def linear(x, weight, *, bias=None):
    return torch.nn.functional.linear(x, weight, bias)


def first(x, other=None):
    return x


# --- functions ------------------------------------------------------------------------------------


def test_modules_have_a_wrapper_of_their_own():
    with pytest.raises(TypeError, match=r"fn is a torch\.nn\.Module \(Linear\).*torchleaf\.TorchModule\(module\)"):
        torch_function(torch.nn.Linear(1, 2))


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: torch_function(linear)(x, jnp.ones((4, 5)), bias=jnp.ones(4)),
            TorchCallError,
            r"(?s)linear failed on operands \(x: float32\[2, 3\], weight: float32\[4, 5\], bias: float32\[4\]\)"
            r".*torch said: RuntimeError: .*\(2x3 and 5x4\)",
        ),
        (
            lambda x: torch_function(torch.matmul)(x, x),
            TorchCallError,
            r"(?s)matmul failed on operands \(args\[0\]: float32\[2, 3\], args\[1\]: float32\[2, 3\]\).*torch said",
        ),
        (
            lambda x: torch_function(lambda batch: batch["x"][0] @ batch["w"])({"x": [x], "w": x}),
            TorchCallError,
            r"(?s)lambda.*operands \(batch\['w'\]: float32\[2, 3\], batch\['x'\]\[0\]: float32\[2, 3\]\).*torch said",
        ),
        (lambda x: torch_function(linear)(x), TypeError, r"linear\(x, weight, \*, bias=None\): missing.*'weight'"),
        (
            lambda x: torch_function(linear)(x, x, bais=x),
            TypeError,
            r"linear\(x, weight, \*, bias=None\): got an unexpected keyword argument 'bais'",
        ),
        (
            lambda x: torch_function(linear)(x, x, x),
            TypeError,
            r"linear\(x, weight, \*, bias=None\): too many positional",
        ),
        (
            lambda x: torch_function(first)(x, {1, 2}),
            TypeError,
            r"first: argument other is a set, neither an array nor hashable.*Pass arrays",
        ),
        (
            lambda x: torch_function(first)(x, other={"a": [bytearray(b"x")]}),
            TypeError,
            r"first: argument other\['a'\]\[0\] is a bytearray",
        ),
        (
            lambda x: torch_function(first)(x, torch.ones(3, 1)),
            TypeError,
            r"first: argument other is a torch\.Tensor of shape \(3, 1\).*torchleaf\.to_jax",
        ),
        (
            lambda x: torch_function(linear)(x, x, bias={"b": torch.nn.Parameter(torch.ones(3))}),
            TypeError,
            r"linear: argument bias\['b'\] is a torch\.Tensor of shape \(3,\).*torchleaf\.to_jax",
        ),
        (
            lambda x: torch_function(first)(x, jax.random.key(0)),
            TypeError,
            r"first: argument other: JAX dtype key<fry> has no torch counterpart.*jax\.random\.key_data",
        ),
        (
            lambda x: torch_function(first)(x, [jnp.ones(3, jnp.int4)]),
            TypeError,
            r"first: argument other\[0\]: JAX dtype int4 has no torch counterpart.*astype",
        ),
        (
            lambda x: torch_function(first)(x, np.array([2**40])),
            OverflowError,
            r"first: argument other: .*1099511627776.*int32.*jax_enable_x64",
        ),
        (
            lambda x: torch_function(first)(x, np.array(["a", "b"])),
            TypeError,
            r"first: argument other is a ndarray",
        ),
    ],
    ids=[
        "shape",
        "builtin",
        "nested",
        "missing",
        "unknown",
        "too many",
        "unhashable",
        "unhashable nested",
        "tensor",
        "parameter",
        "PRNG key",
        "int4",
        "int64",
        "strings",
    ],
)
def test_argument(call, error, message, jit, engine):
    if engine == "xla":  # whose shapes are those of fake tensors, which say it in other words
        message = message.replace(r".*\(2x3 and 5x4\)", "")
    with pytest.raises(error, match=message):
        (jax.jit(call) if jit else call)(X)


def test_the_torch_exception_is_the_cause():
    with pytest.raises(TorchCallError) as info:
        torch_function(linear)(X, jnp.ones((4, 5)))
    assert isinstance(info.value.__cause__, RuntimeError)
    assert str(info.value.__cause__) in str(info.value)


def test_python_error_while_tracing():
    def buggy(x):
        return x.no_such_method()

    with pytest.raises(
        TorchCallError, match=r"(?s)buggy failed on.*torch said: AttributeError.*no_such_method"
    ) as info:
        torch_function(buggy)(X)
    assert isinstance(info.value.__cause__, AttributeError)


def test_many_operands_are_summarised():
    with pytest.raises(TorchCallError, match=r"xs\[0\]: float32\[2, 3\].*\.\.\. 22 more \.\.\..*xs\[29\]"):
        torch_function(lambda xs: xs[0] @ xs[1])([X] * 30)


def test_a_failed_call_does_not_spoil_the_next():
    fn = torch_function(linear)
    with pytest.raises(TorchCallError):
        fn(X, jnp.ones((4, 5)))
    assert_trees_close(fn(X, jnp.ones((4, 3))), X @ jnp.ones((3, 4)))


# --- outputs --------------------------------------------------------------------------------------


class Thing:
    pass


def _quietly(fn):
    def quiet(x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fn(x)

    return quiet


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: Thing(), r"lambda.* returns a .*Thing at output: neither a tensor.*Return its tensors, .*register"),
        (lambda x: {"a": [x, Thing()]}, r"lambda.* returns a .*Thing at output\['a'\]\[1\]: neither a tensor"),
        (lambda x: (x, np.ones(3)), r"lambda.* returns a numpy\.ndarray at output\[1\]: neither a tensor"),
        (lambda x: (x, {1, 2}), r"lambda.* returns a builtins\.set at output\[1\]: neither a tensor"),
        (lambda x: [x.to_sparse()], r"lambda.* layout torch\.sparse_coo at output\[0\].*to_dense"),
        (
            _quietly(lambda x: x.to_sparse_csr()),
            r"quiet returns a tensor of layout torch\.sparse_csr at output.*to_dense",
        ),
    ],
    ids=["object", "nested object", "numpy", "set", "sparse", "csr"],
)
def test_output(fn, message, jit):
    with pytest.raises(TorchCallError, match=message):
        (jax.jit if jit else lambda f: f)(torch_function(fn))(X)


# --- random numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x + torch.randn(3),
        lambda x: x + torch.rand_like(x),
        lambda x: torch.nn.functional.dropout(x, 0.5),
        lambda x: torch.bernoulli(x.sigmoid()),
        lambda x: x.clone().uniform_(),
        lambda x: x[torch.randperm(2)],
        lambda x: torch.multinomial(x.exp(), 1),
        lambda x: torch.distributions.Normal(x, 1.0).rsample(),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.1),
    ],
    ids=["randn", "rand_like", "dropout", "bernoulli", "uniform_", "randperm", "multinomial", "rsample", "attention"],
)
def test_random_op(fn, engine, request):
    if engine == "xla" and "rsample" in request.node.name:
        pytest.skip("torch looks at values of the distribution's parameters")
    with pytest.raises(RandomnessError, match=r"lambda.* draws random numbers \(aten\..*`key=`.*jax\.random"):
        torch_function(fn)(X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.nn.functional.dropout(x, 0.5, training=False),
        lambda x: torch.nn.functional.dropout(x, 0.0),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.0)[0] * 0 + x,
        lambda x: torch.empty_like(x).copy_(x),
    ],
    ids=["eval dropout", "dropout of nothing", "attention", "empty"],
)
def test_op_that_draws_nothing(fn):
    assert_trees_close(torch_function(fn)(X), X)
