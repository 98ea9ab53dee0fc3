"""What goes wrong with a module says so in every framework: which module, which argument or attribute, what to do."""

import jax
import jax.numpy as jnp
import pytest
import torch
from frameworks import eager_and_jit, every_framework
from torch import nn
from torchleaf import TorchCallError

pytestmark = pytest.mark.both_engines(every=4)
X = jnp.ones((2, 3))


def _call(model, *args, jit, **kwargs):
    return model.maybe_jit(lambda m, *args: m(*args, **kwargs), jit=jit)(*args)


# --- modules that cannot be wrapped --------------------------------------------------------------


class _Generating(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.steps = (i for i in range(3))


class _Doubled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 2 if func is nn.functional.linear else out


def _with_weight(make):
    module = nn.Linear(3, 2)
    module.weight = make(module.weight)
    return module


def _with_accumulation_hook(weight):
    weight.register_post_accumulate_grad_hook(lambda p: None)
    return weight


@every_framework
@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.LazyLinear(2), r"LazyLinear\.weight is uninitialised .*Run the torch module once"),
        (lambda: nn.Linear, r"must be a torch\.nn\.Module, got type \(a class: pass an instance\)"),
        (lambda: torch.sin, r"must be a torch\.nn\.Module, got builtin_function_or_method"),
        (lambda: nn.Linear(3, 2, device="meta"), r"Linear\.weight is a meta tensor.*Materialise it first"),
        (
            _Generating,
            r"_Generating cannot be copied.*attribute `steps`.*generator.*Remove the attribute.*__deepcopy__",
        ),
        (
            lambda: _with_weight(lambda w: nn.Parameter(w.detach().as_subclass(_Doubled))),
            r"Linear\.weight is a _Doubled, a tensor with operations of its own.*as_subclass\(torch\.Tensor\)",
        ),
        (
            lambda: _with_weight(_with_accumulation_hook),
            r"Linear\.weight has a hook .*register_post_accumulate_grad_hook.*`register_hook`",
        ),
    ],
    ids=["lazy", "class", "function", "meta", "not-copyable", "subclass", "accumulation"],
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
def test_dtype_of_an_argument(framework, jit, dtype, engine):
    """torch's shape rules do not look at dtypes, so this error is as the kernel's; it names the argument too."""
    shown = rf"input: {jnp.dtype(dtype).name}\[2, 3\]"
    message = rf"Linear (.|\n)*must have the same dtype(.|\n)*{shown}"
    if engine == "xla":  # in the trace, where torch's dtypes are named
        message = r"Linear failed on operands \((.|\n)*input: (bfloat16|int64)\[2, 3\](.|\n)*must have the same dtype"
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(_call(framework(nn.Linear(3, 2)), X.astype(dtype), jit=jit))


@pytest.mark.torch_engine  # values are read
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
