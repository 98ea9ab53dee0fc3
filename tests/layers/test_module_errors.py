"""What goes wrong with a module says so: which module, which argument or attribute, and what to do."""

import threading
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from custom_layers import Counting
from module_reference import eager_and_filter_jit
from torch import nn
from torchleaf import RandomnessError, StateError, TorchCallError, TorchModule

X = jnp.ones((2, 3))


# --- modules that cannot be wrapped --------------------------------------------------------------


class _Locked(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.lock = threading.Lock()


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated, and still about
        return torch.jit.script(nn.Linear(3, 2))


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.LazyLinear(2), r"LazyLinear\.weight is uninitialised .*Run the torch module once"),
        (_scripted, "RecursiveScriptModule is a TorchScript module.*Wrap the Python module"),
        (lambda: nn.Linear, r"must be a torch\.nn\.Module, got type \(a class: pass an instance\)"),
        (lambda: torch.sin, r"must be a torch\.nn\.Module, got builtin_function_or_method"),
        (lambda: nn.Linear(3, 2).double(), r"Linear\.weight is torch\.float64.*jax_enable_x64.*module\.float\(\)"),
        (lambda: nn.Linear(3, 2, device="meta"), r"Linear\.weight is a meta tensor.*Materialise it first"),
        (_Locked, r"_Locked cannot be copied.*_thread\.lock.*Remove the attribute.*__deepcopy__"),
    ],
    ids=["lazy", "scripted", "class", "function", "float64", "meta", "not-copyable"],
)
def test_wrapping(module, message):
    with pytest.raises(TypeError, match=message):
        TorchModule(module())


def test_float64_is_welcome_under_x64(x64):
    assert TorchModule(nn.Linear(3, 2).double()).params["weight"].dtype == jnp.float64


@pytest.mark.usefixtures("no_type_checks")
def test_unknown_vmap_method():
    with pytest.raises(ValueError, match=r"vmap_method must be one of .*'auto'.*got 'fast'"):
        TorchModule(nn.Linear(3, 2), vmap_method="fast")


# --- calls that do not fit the module ------------------------------------------------------------


class _Boxed(nn.Linear):
    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"y": super().forward(x), "box": object()}


class _Sparse(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to_sparse()


@eager_and_filter_jit
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: TorchModule(nn.Linear(4, 2))(x),
            TorchCallError,
            r"Linear failed on operands \(.*weight: float32\[2, 4\], input: float32\[2, 3\]\)(.|\n)*torch said: ",
        ),
        (
            lambda x: TorchModule(nn.Bilinear(3, 3, 2))(x),
            TypeError,
            r"Bilinear\(.*missing a required argument: 'input2'",
        ),
        (
            lambda x: TorchModule(nn.Linear(3, 2))(x, scale=2),
            TypeError,
            r"Linear\(.*unexpected keyword argument 'scale'",
        ),
        (
            lambda x: TorchModule(nn.Linear(3, 2))(torch.ones(3)),
            TypeError,
            r"Linear: argument input is a torch\.Tensor.*torchleaf\.to_jax",
        ),
        (
            lambda x: torchleaf.stack([TorchModule(nn.Linear(3, 2)) for _ in range(2)])(x),
            TorchCallError,
            r"Linear: leaf '(weight|bias)' has shape .*stacked model is called under vmap.*eqx\.filter_vmap",
        ),
        (lambda x: TorchModule(nn.Linear(3, 2)).call("encode", x), AttributeError, "Linear has no method 'encode'"),
        (lambda x: TorchModule(nn.Linear(3, 2)).call("bias", x), AttributeError, "Linear has no method 'bias'"),
        (
            lambda x: TorchModule(_Boxed(3, 2))(x),
            TorchCallError,
            r"_Boxed returns a builtins\.object at output\['box'\]",
        ),
        (lambda x: TorchModule(_Sparse())(x), TorchCallError, r"_Sparse returns a tensor of layout .*\.to_dense\(\)"),
        (
            lambda x: eqx.partition(TorchModule(nn.Linear(3, 2)), lambda leaf: False)[0](x),
            TypeError,
            r"Linear: leaf '(weight|bias)' is missing.*eqx\.combine",
        ),
    ],
    ids=["shape", "missing", "unknown", "tensor", "stacked", "method", "attribute", "object", "sparse", "partitioned"],
)
def test_call(jit, call, error, message):
    with pytest.raises(error, match=message):
        jit(call)(X)


@eager_and_filter_jit
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_dtype_of_an_argument(jit, dtype):
    """torch's shape rules do not look at dtypes, so this error is the kernel's; it names the argument too."""
    shown = rf"input: {jnp.dtype(dtype).name}\[2, 3\]"
    with pytest.raises(Exception, match=rf"Linear (.|\n)*must have the same dtype(.|\n)*{shown}"):
        jax.block_until_ready(jit(TorchModule(nn.Linear(3, 2)))(X.astype(dtype)))


def test_an_exception_of_torch_at_run_time_names_the_module_and_quotes_the_traceback():
    class Checked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.isfinite(x).all():
                raise ValueError("x is not finite")
            return super().forward(x)

    model = TorchModule(Checked(3, 2), out_shape=jax.ShapeDtypeStruct((2, 2), jnp.float32))
    with pytest.raises(Exception, match=r"Checked raised ValueError: x is not finite(.|\n)*test_module_errors\.py"):
        jax.block_until_ready(eqx.filter_jit(model)(X * jnp.nan))


def test_a_model_works_again_after_an_error():
    model = TorchModule(nn.Linear(3, 2))
    with pytest.raises(TorchCallError):
        model(jnp.ones((2, 4)))
    assert model(X).shape == (2, 2)


# --- modules whose forward is not a pure function ------------------------------------------------


class _Stateful(nn.Module):
    """Has every kind of attribute that a forward can change."""

    def __init__(self):
        super().__init__()
        self.linear, self.child = nn.Linear(3, 3), nn.Identity()
        self.register_buffer("total", torch.zeros(3))
        self.hidden, self.child.calls = torch.zeros(3), 0
        self.history: list[object] = []
        self.stats = {"calls": 0}


class _BufferInPlace(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total += x.sum(0)
        return x + self.total


class _BufferReassigned(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total = self.total + x.sum(0)
        return x + self.total


class _CounterOfChild(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.child.calls += 1
        return x * self.child.calls


class _PlainTensorReassigned(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = torch.tanh(x.sum(0) + self.hidden)
        return x + self.hidden


class _PlainTensorInPlace(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden += 1
        return x + self.hidden


class _ListOfTensors(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.history.append(self.linear(x))
        return x


class _ListOfNumbers(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.history.append(1)
        return x * len(self.history)


class _Dict(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stats["calls"] += 1
        return x * self.stats["calls"]


@eager_and_filter_jit
@pytest.mark.parametrize(
    ("module", "what"),
    [
        (lambda: nn.BatchNorm1d(3), "BatchNorm1d changes buffer `num_batches_tracked`, `running_mean`, `running_var`"),
        (
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
            r"ParametrizedLinear changes buffer `parametrizations\.weight\.0\._u`",
        ),
        (_BufferInPlace, "_BufferInPlace changes buffer `total`"),
        (_BufferReassigned, "_BufferReassigned changes buffer `total`"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_changes_of_buffers_without_state_are_refused(jit, module, what):
    model = TorchModule(module())
    for _ in range(2):  # the first refusal leaves nothing behind
        with pytest.raises(StateError, match=rf"{what}.*make_with_state.*eqx\.nn\.inference_mode"):
            jit(lambda m, x: m(x))(model, X)


@eager_and_filter_jit
@pytest.mark.parametrize(
    ("module", "what"),
    [
        (lambda: Counting(3), "Counting changes attribute `calls`"),
        (_CounterOfChild, r"_CounterOfChild changes attribute `child\.calls`"),
        (_PlainTensorReassigned, "_PlainTensorReassigned changes attribute `hidden`"),
        (_PlainTensorInPlace, "_PlainTensorInPlace changes attribute `hidden`"),
        (_ListOfTensors, "_ListOfTensors changes attribute `history`"),
        (_ListOfNumbers, "_ListOfNumbers changes attribute `history`"),
        (_Dict, "_Dict changes attribute `stats`"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_changes_of_attributes_are_refused(jit, module, what):
    model, state = eqx.nn.make_with_state(TorchModule)(module())
    for _ in range(2):
        with pytest.raises(StateError, match=rf"{what}.*Make it a buffer"):
            jit(lambda m, s, x: m(x, state=s))(model, state, X)


@eager_and_filter_jit
@pytest.mark.parametrize(
    ("module", "where"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), r"bernoulli.*drawn in submodule `1` \(Dropout\)"),
        (lambda: nn.TransformerEncoderLayer(3, 1, 4), r"bernoulli.*drawn in submodule `self_attn` \(Multihead"),
        (lambda: nn.RReLU(), "rrelu"),
        (lambda: nn.LSTM(3, 2, num_layers=2, dropout=0.5), "bernoulli"),
    ],
    ids=["Dropout", "TransformerEncoderLayer", "RReLU", "LSTM"],
)
def test_randomness_without_a_key_is_refused_in_training_and_absent_in_inference(jit, module, where):
    model = TorchModule(module())
    with pytest.raises(RandomnessError, match=rf"{model.module.name} draws random numbers \(aten\.{where}") as error:
        jit(lambda m, x: m(x))(model, X)
    assert "`key=`" in str(error.value)
    assert "evaluation mode" in str(error.value)
    output = jit(lambda m, x: m(x))(eqx.nn.inference_mode(model), X)
    assert jnp.all(jnp.isfinite(jax.tree.leaves(output)[0]))


@pytest.mark.parametrize("module", [nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.LSTM(3, 2, dropout=0.0)])
def test_dropout_that_drops_nothing_is_no_randomness(module):
    TorchModule(module)(X)


class _StashesInput(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.child.last = x[0]
        return self.linear(x)


class _LeaksInput(_Stateful):
    kept: list[torch.Tensor] = []  # noqa: RUF012 (the point of it)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(x)
        return self.linear(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_StashesInput, r"_StashesInput keeps an argument.*`child\.last`.*tensor\.clone\(\)"),
        (_LeaksInput, r"_LeaksInput keeps argument x .*tensor\.clone\(\)"),
    ],
)
def test_an_argument_that_stays_behind_is_refused(module, message):
    with pytest.raises(TorchCallError, match=message):
        TorchModule(module())(X)
    _LeaksInput.kept.clear()


class _StashesResult(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.child.last = torch.tanh(self.linear(x))
        return self.child.last * 2


def test_a_result_kept_for_inspection_does_not_stay():
    """Many models keep attention maps so; the skeleton must not hold on to memory of one call."""
    module = _StashesResult()
    model = TorchModule(module)
    for x in (X, 2 * X):
        assert jnp.allclose(model(x), module(torchleaf.to_torch(x)).detach().numpy(), rtol=1e-5)
    assert not hasattr(model.module.skeleton.child, "last")


def test_write_into_a_tensor_of_no_module():
    total = torch.zeros(3)

    class Accumulating(torch.nn.Module):
        def forward(self, x):
            total.add_(1)
            return x + total

    model = TorchModule(Accumulating())
    with pytest.raises(StateError, match=r"Accumulating writes into a tensor of shape .*captured"):
        model(jnp.ones(3))
    assert torch.equal(total, torch.zeros(3))
