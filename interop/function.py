"""`torch_function`: a torch callable as a JAX function over pytrees."""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import jax
import torch
from jax.core import Tracer

from .calls.call import Aval, Residuals, TorchCall, VmapMethod
from .errors import TorchCallError
from .modes.ambient import autocast_here
from .modes.kernels import COMPILED, NONE, compiled_code
from .modes.random import PASS_A_KEY, LateKey, key_operand
from .primitive import bind
from .tracing.arguments import Arguments, Filler
from .tracing.examples import Example, made_examples
from .tracing.keys import with_key
from .tracing.signature import Signature
from .tracing.specialize import Specialized
from .tracing.trace import Trace, trace
from .tracing.traceable import Flat, Traceable
from .values import dtypes
from .values.arrays import array_to_torch
from .values.device import device_here

_VMAP_METHODS = ("auto", "vmap", "batched", "loop")


def torch_function(
    fn: Callable[..., Any] | None = None,
    *,
    vmap_method: VmapMethod = "auto",
    residuals: Residuals = "live",
    forward_mode: bool = True,
    replay: bool = True,
    out_shape: Any = None,
    example_args: Sequence[Any] | None = None,
) -> Any:
    """Make a torch function callable from JAX: traced, differentiated, batched and compiled like a JAX function.

    ```python
    @torchleaf.torch_function
    def huber(prediction, target):
        return torch.nn.functional.huber_loss(prediction, target)

    jax.jit(jax.grad(huber))(x, y)
    ```

    The function must be pure: it sees arrays as `torch.Tensor`s and returns tensors. What it writes into an
    argument in place stays inside the call. One that draws random numbers is called with `key=`, a JAX PRNG key: the
    same key gives the same numbers, and torch's global generators are left alone.

    ```python
    noisy = torchleaf.torch_function(lambda x: x + torch.randn_like(x))
    noisy(x, key=jax.random.key(0))
    ```

    **Arguments:**

    - `fn`: any callable over tensors, bound methods included. Its positional and keyword arguments may be any pytrees;
      `jax.Array` and NumPy leaves become tensors of the same shape and dtype (without `jax_enable_x64`, int32 arrives
      as torch's default int64), every other leaf (bool, number, string, None, dtype) is passed as it is and is static.
    - `vmap_method`: what `jax.vmap` does. `"vmap"`: `torch.func.vmap`; `"batched"`: one call with the batch axis
      leading in every batched array, for a function that takes batches itself; `"loop"`: example by example inside
      one call; `"auto"`: `"vmap"` where torch has the batching rules, otherwise `"loop"`, with a warning.
    - `residuals`: what reverse mode keeps from the forward call. `"live"`: torch's autograd graph, so that the backward
      call need not run the forward again (on a GPU, for now, it does); `"recompute"`: the arguments only, and the
      backward call runs the forward again.
    - `forward_mode`: with False, derivatives go through `jax.custom_vjp` and forward mode raises JAX's message;
      for torch code that has no forward-mode formula.
    - `replay`: in a compiled program, a call (up to about a second of work, on a CPU) runs Python in its first two runs
      only, as `jax.jit` runs Python once; later runs repeat the torch ops that those ran, if both ran the same, and as
      long as Python would read the same values. With False, Python runs each time: for functions with side effects.
    - `out_shape`: a pytree of `jax.ShapeDtypeStruct` like the output, for a function whose output shapes depend on
      values.
    - `example_args`: positional arguments to run a function on that reads values, where made ones will not do.

    **Returns:** a function of the same signature (and `key=`), returning what `fn` returns with `jax.Array`s for
    tensors, in the dtypes torch gives, canonicalised as JAX does. Without `fn`: a decorator.

    **Raises:** `TypeError` for arguments that do not fit the signature; `torchleaf.RandomnessError` when it draws
    random numbers without a key; `torchleaf.TorchCallError` when it cannot be traced or fails, with torch's message.

    Source: [`torch.func`](https://docs.pytorch.org/docs/stable/func.html),
    [`jax.extend.core.Primitive`](https://docs.jax.dev/en/latest/jax.extend.core.html).
    """
    options = {
        "vmap_method": vmap_method,
        "residuals": residuals,
        "forward_mode": forward_mode,
        "replay": replay,
        "out_shape": out_shape,
        "example_args": example_args,
    }
    if fn is None:
        return lambda fn: TorchFunction(fn, **options)
    return TorchFunction(fn, **options)


def check_options(vmap_method: Any, residuals: Any) -> None:
    """`ValueError` naming an option that is none."""
    if vmap_method not in _VMAP_METHODS:
        raise ValueError(f"vmap_method must be one of {_VMAP_METHODS}, got {vmap_method!r}.")
    if residuals not in ("live", "recompute"):
        raise ValueError(f"residuals must be 'live' or 'recompute', got {residuals!r}.")


class TorchFunction:
    """A torch callable as a JAX function; made by `torch_function`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        vmap_method: VmapMethod = "auto",
        residuals: Residuals = "live",
        forward_mode: bool = True,
        replay: bool = True,
        out_shape: Any = None,
        example_args: Sequence[Any] | None = None,
    ):
        if not callable(fn):
            raise TypeError(f"torch_function: fn must be callable, got {type(fn).__name__}.")
        if isinstance(fn, torch.nn.Module):
            raise TypeError(
                f"torch_function: fn is a torch.nn.Module ({type(fn).__name__}), whose parameters would be constants. "
                "Use torchleaf.TorchModule(module) to have them as leaves, or module.forward to keep them constant."
            )
        check_options(vmap_method, residuals)
        self.name = name or _name_of(fn)
        if example_args is not None and not isinstance(example_args, tuple | list):
            raise TypeError(f"example_args must be a tuple of positional arguments, got {type(example_args).__name__}.")
        self._fn, self._out_shape, self._example_args = fn, out_shape, example_args
        self._options: dict[str, Any] = {
            "vmap_method": vmap_method,
            "residuals": residuals,
            "forward_mode": forward_mode,
            "replay": replay,
        }
        functools.update_wrapper(self, fn, updated=())
        self._forget()

    def parts(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The torch callable, and the options that make the same of it once more."""
        return self._fn, {**self._options, "out_shape": self._out_shape, "example_args": self._example_args}

    def calls(self) -> Iterator[TorchCall]:
        """The calls that it was traced to, and those derived from them."""
        for specialized in self._specialized.values():
            yield from specialized.call.family()

    def _forget(self) -> None:
        """Be as one that was never called."""
        self._signature = Signature(self._fn, self.name)
        self._specialized: dict[Any, Specialized] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_signature", "_specialized")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """One that stands in a module in the place of its function (`@torch_function`) is found there, by name."""
        return vars(self)["__qualname__"] if _is_found(self) else super().__reduce_ex__(protocol)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"torch_function({self.name})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = None
        if "key" in kwargs and not self._signature.wants_key(kwargs["key"], args):
            key = kwargs.pop("key")
        return self.apply(Arguments(args, kwargs, self._signature), key)[0]

    def apply(self, arguments: Arguments, key: Any = None, *, stateful: bool = False) -> tuple[Any, dict[int, Any]]:
        """Call with arguments already taken apart; the output, and new values of operands that are state.

        With `stateful` the caller keeps those values; otherwise a call that changes state is refused.
        """
        like = key.like if isinstance(key, LateKey) else key
        key_type = None if key is None else (getattr(like, "dtype", None), getattr(like, "shape", None))
        x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        device = device_here(arguments.operands)
        signature = (arguments.key, x64, device.type, autocast_here(), key_type, stateful)
        specialized = self._specialized.get(signature)
        if specialized is None:
            specialized = self._specialized[signature] = self._specialize(arguments, like, stateful, device)
        operands = arguments.operands
        if specialized.random:
            made = key.make() if isinstance(key, LateKey) else key
            operands = [*operands, key_operand(made, self.name)]
        return specialized.rebuild(bind(specialized.call, *operands))

    # Hooks for the methods of modules, whose leading operands are weights.

    state_operands: tuple[int, ...] = ()
    """Operands whose new values a stateful caller keeps."""
    trainable_operands: tuple[int, ...] = ()
    """Operands that are parameters, which require gradients in torch."""
    is_loose = False
    """Whether torch's autograd has to differentiate each call by itself, as where gradients have hooks."""
    key_remedy = PASS_A_KEY
    """What to do where random numbers are drawn without a key."""

    def operand_dtypes(self, avals: Sequence[Aval]) -> list[torch.dtype]:
        """The torch dtypes the flat operands arrive in."""
        return [dtypes.operand_dtype(a.dtype) for a in avals]

    def foreign(self) -> dict[int, str]:
        """Storages that the callable must not read, because operands stand for what they hold."""
        return {}

    def observer(self, fill: Filler) -> Flat:
        """The callable over flat tensors, as it runs while it is traced."""
        fn = self._fn

        def run(*tensors: torch.Tensor) -> tuple[Any, tuple[()]]:
            args, kwargs = fill(tensors)
            return fn(*args, **kwargs), ()

        return run

    def runner(self, fill: Filler, found: Trace, *, stateful: bool) -> Flat:
        """The same as compiled programs run it; of state operands it returns those in `found.state`."""
        return self.observer(fill)

    def check(self, found: Trace, *, stateful: bool) -> Trace:
        """Refuse what the trace found and the call cannot do; what is left of it."""
        return found

    def refuse_write(self, operands: Collection[int], *, stateful: bool) -> NoReturn:
        """Raise the error for a run that changes state operands which the trace did not find to be changed."""
        raise AssertionError("no operand is state")

    def _specialize(self, arguments: Arguments, key: Any, stateful: bool, device: torch.device) -> Specialized:
        """Trace the callable for one signature."""
        arguments.check_signature()
        wanted, fill = self.operand_dtypes(arguments.avals), arguments.filler()
        avals, names, function = list(arguments.avals), arguments.names(), self.observer(fill)
        if key is not None:
            words = key_operand(key, self.name)
            avals, names, wanted = [*avals, Aval(words.shape, words.dtype)], [*names, "key"], [*wanted, torch.uint32]
            function = with_key(function, kernels=NONE)
        traced = Traceable(
            function,
            self.name,
            names,
            [(a.shape, d) for a, d in zip(avals, wanted, strict=True)],
            device,
            self.state_operands,
            explores=stateful and bool(self.state_operands),
            has_key=key is not None,
            key_remedy=self.key_remedy,
            trainable=self.trainable_operands,
            foreign=self.foreign(),
        )
        found = trace(
            traced, out_shape=self._out_shape, examples=lambda: self._examples(arguments, traced.specs, wanted)
        )
        found = self.check(found, stateful=stateful)
        found = replace(found, fused_kernels=found.fused_kernels | compiled_code(self._fn))
        run = self.runner(fill, found, stateful=stateful)
        if found.random:  # ops in compiled code cannot be seen
            run = with_key(run, kernels=found.fused_kernels & {COMPILED}, host=bool(found.host_random))
        elif key is not None:
            avals, names, wanted = avals[:-1], names[:-1], wanted[:-1]
        return Specialized(
            run,
            names,
            avals,
            wanted,
            found,
            name=self.name,
            device=device,
            buffers=self.state_operands,
            refuse_write=functools.partial(self.refuse_write, stateful=stateful),
            key_remedy=None if found.random else self.key_remedy,
            trainable=self.trainable_operands,
            is_loose=self.is_loose,
            foreign=traced.foreign,
            **self._options,
        )

    def _examples(self, arguments: Arguments, specs: Any, wanted: Sequence[torch.dtype]) -> Iterator[Example]:
        """Values to run the callable on: the arguments if they are not traced, `example_args`, or made ones."""
        operands, is_given = arguments.operands, not any(map(_is_traced, arguments.operands))
        if self._example_args is not None and not is_given:
            operands, is_given = self._example_operands(arguments), True
        known = [None if _is_traced(x) else _values(x, d) for x, d in zip(operands, wanted, strict=False)]
        known += [functools.partial(torch.zeros, *spec[:1], dtype=spec[1]) for spec in specs[len(known) :]]  # any key
        if is_given:
            yield Example(lambda: [make() for make in known if make is not None], is_given=True)
            known = [*known[: arguments.n_leading], *(None for _ in known[arguments.n_leading :])]
        yield from made_examples(specs, known, arguments.n_leading)

    def _example_operands(self, arguments: Arguments) -> list[Any]:
        with jax.ensure_compile_time_eval():
            example = Arguments(tuple(self._example_args or ()), {}, self._signature)
        if example.avals != arguments.avals:
            raise TorchCallError(
                f"{self.name} is called with {_shapes(arguments)}, but example_args are {_shapes(example)}. "
                "Give example_args of the shapes and dtypes it is called with, or `out_shape`."
            )
        return example.operands


def _is_traced(operand: Any) -> bool:
    return isinstance(operand, Tracer)


def _values(operand: Any, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """What makes a tensor of an operand's values."""

    def make() -> torch.Tensor:
        with jax.ensure_compile_time_eval():
            return array_to_torch(operand, copy=True).to(dtype)

    return make


def _shapes(arguments: Arguments) -> str:
    return "(" + ", ".join(f"{a.dtype}{list(a.shape)}" for a in arguments.avals) + ")"


def _is_found(function: Any) -> bool:
    """Whether it is what its module has by its name."""
    found: Any = sys.modules.get(str(getattr(function, "__module__", None)))
    for name in getattr(function, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is function


def _name_of(fn: Callable[..., Any]) -> str:
    bound_to = getattr(fn, "__self__", None)
    name = getattr(fn, "__name__", type(fn).__qualname__)
    if isinstance(bound_to, torch.nn.Module):
        return f"{type(bound_to).__qualname__}.{name}"
    return name if inspect.isbuiltin(fn) else getattr(fn, "__qualname__", name)
