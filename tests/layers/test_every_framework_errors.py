"""What goes wrong with a module says so in every framework: which module, which argument or attribute, what to do."""

import threading
import warnings

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from custom_layers import Counting
from frameworks import EquinoxModel, LinenModel, eager_and_jit, every_framework
from torch import nn
from torchleaf import StateError, TorchCallError

X = jnp.ones((2, 3))


def _call(model, *args, jit, **kwargs):
    return model.maybe_jit(lambda m, *args: m(*args, **kwargs), jit=jit)(*args)


# --- modules that cannot be wrapped --------------------------------------------------------------


class _Locked(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.lock = threading.Lock()


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated, and still about
        return torch.jit.script(nn.Linear(3, 2))


@every_framework
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
def test_wrapping(framework, module, message):
    with pytest.raises(TypeError, match=message):
        framework(module())


@every_framework
def test_float64_is_welcome_under_x64(framework, x64):
    assert framework(nn.Linear(3, 2).double()).weights.params["weight"].dtype == jnp.float64


@every_framework
@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("option", ["vmap_method", "residuals"])
def test_unknown_options(framework, option):
    with pytest.raises(ValueError, match=rf"{option} must be .*got 'fast'"):
        framework(nn.Linear(3, 2), **{option: "fast"})


# --- calls that do not fit the module ------------------------------------------------------------


class _Boxed(nn.Linear):
    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"y": super().forward(x), "box": object()}


class _Sparse(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to_sparse()


@every_framework
@eager_and_jit
@pytest.mark.parametrize(
    ("module", "args", "kwargs", "error", "message"),
    [
        (
            lambda: nn.Linear(4, 2),
            (X,),
            {},
            TorchCallError,
            r"Linear failed on operands \(.*weight: float32\[2, 4\], input: float32\[2, 3\]\)(.|\n)*torch said: ",
        ),
        (lambda: nn.Bilinear(3, 3, 2), (X,), {}, TypeError, r"Bilinear\(.*missing a required argument: 'input2'"),
        (lambda: nn.Linear(3, 2), (X,), {"scale": 2}, TypeError, r"Linear\(.*unexpected keyword argument 'scale'"),
        (
            lambda: nn.Linear(3, 2),
            (),
            {"input": torch.ones(3)},
            TypeError,
            r"Linear: argument input is a torch\.Tensor.*torchleaf\.to_jax",
        ),
        (lambda: _Boxed(3, 2), (X,), {}, TorchCallError, r"_Boxed returns a builtins\.object at output\['box'\]"),
        (_Sparse, (X,), {}, TorchCallError, r"_Sparse returns a tensor of layout .*\.to_dense\(\)"),
        (lambda: nn.Linear(3, 2), (X,), {"method": "encode"}, AttributeError, "encode"),
        (lambda: nn.Linear(3, 2), (X,), {"method": "bias"}, AttributeError, "bias"),
    ],
    ids=["shape", "missing", "unknown", "tensor", "object", "sparse", "method", "attribute"],
)
def test_call(framework, jit, module, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        _call(framework(module()), *args, jit=jit, **kwargs)


@every_framework
@eager_and_jit
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_dtype_of_an_argument(framework, jit, dtype):
    """torch's shape rules do not look at dtypes, so this error is the kernel's; it names the argument too."""
    shown = rf"input: {jnp.dtype(dtype).name}\[2, 3\]"
    with pytest.raises(Exception, match=rf"Linear (.|\n)*must have the same dtype(.|\n)*{shown}"):
        jax.block_until_ready(_call(framework(nn.Linear(3, 2)), X.astype(dtype), jit=jit))


@every_framework
def test_an_exception_of_torch_at_run_time_names_the_module_and_quotes_the_traceback(framework):
    class Checked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.isfinite(x).all():
                raise ValueError("x is not finite")
            return super().forward(x)

    model = framework(Checked(3, 2), out_shape=jax.ShapeDtypeStruct((2, 2), jnp.float32))
    with pytest.raises(Exception, match=r"Checked raised ValueError: x is not finite(.|\n)*framework_errors\.py"):
        jax.block_until_ready(_call(model, X * jnp.nan, jit=True))


@every_framework
@eager_and_jit
def test_a_model_works_again_after_an_error(framework, jit):
    model = framework(nn.Linear(3, 2))
    with pytest.raises(TorchCallError):
        _call(model, jnp.ones((2, 4)), jit=jit)
    assert _call(model, X, jit=jit).shape == (2, 2)


@every_framework
@eager_and_jit
def test_leaves_of_another_shape(framework, jit):
    model = framework(nn.Linear(3, 2)).replaced({"weight": jnp.ones((2, 4))})
    with pytest.raises(Exception, match=r"'weight' has shape \(2, 4\).*\(2, 3\)|\"weight\" .*\(2, 3\).*\(2, 4\)"):
        _call(model, X, jit=jit)


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


@pytest.mark.parametrize("framework", [EquinoxModel, LinenModel], ids=lambda f: f.name)
@eager_and_jit
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
def test_changes_of_buffers_without_a_place_for_them_are_refused(framework, jit, module, what):
    model = framework(module(), with_state=False)
    for _ in range(2):  # the first refusal leaves nothing behind
        with pytest.raises(StateError, match=rf"{what}.*{framework.state_remedy}"):
            _call(model, X, jit=jit)


@every_framework
@eager_and_jit
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
def test_changes_of_attributes_are_refused(framework, jit, module, what):
    model = framework(module(), with_state=True)
    for _ in range(2):
        with pytest.raises(StateError, match=rf"{what}.*Make it a buffer"):
            _call(model, X, jit=jit)


class _StashesInput(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.child.last = x[0]
        return self.linear(x)


class _LeaksInput(_Stateful):
    kept: list[torch.Tensor] = []  # noqa: RUF012 (the point of it)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(x)
        return self.linear(x)


@every_framework
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_StashesInput, r"_StashesInput keeps an argument.*`child\.last`.*tensor\.clone\(\)"),
        (_LeaksInput, r"_LeaksInput keeps argument x .*tensor\.clone\(\)"),
    ],
)
def test_an_argument_that_stays_behind_is_refused(framework, module, message):
    with pytest.raises(TorchCallError, match=message):
        framework(module())(X)
    _LeaksInput.kept.clear()


class _StashesResult(_Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.child.last = torch.tanh(self.linear(x))
        return self.child.last * 2


@every_framework
def test_a_result_kept_for_inspection_does_not_stay(framework):
    """Many models keep attention maps so; the skeleton must not hold on to memory of one call."""
    module = _StashesResult()
    model = framework(module)
    for x in (X, 2 * X):
        assert jnp.allclose(model(x), module(torchleaf.to_torch(x)).detach().numpy(), rtol=1e-5)
    assert not hasattr(model.skeleton.child, "last")


@every_framework
def test_write_into_a_tensor_of_no_module(framework):
    total = torch.zeros(3)

    class Accumulating(torch.nn.Module):
        def forward(self, x):
            total.add_(1)
            return x + total

    model = framework(Accumulating())
    with pytest.raises(StateError, match=r"Accumulating writes into a tensor of shape .*captured"):
        model(jnp.ones(3))
    assert torch.equal(total, torch.zeros(3))
