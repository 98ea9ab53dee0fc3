"""`torch_function`: a torch callable as a JAX function over pytrees."""

import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn, final

import jax
import torch

from .calls.call import TorchCall
from .modes.autocast import autocast_here
from .modes.random import DeferredKey, key_operand
from .primitive import bind
from .tracing.arguments import Arguments
from .tracing.signature import Signature
from .tracing.specialize import specialize
from .tracing.specialized import Specialized
from .tracing.target import FunctionTarget, Target
from .types import CallOptions, Engine, Residuals, VmapMethod
from .values.device import device_here
from .values.names import found_by_name
from .xla.computed import Computed
from .xla.specialize import specialize as specialize_for_xla


def torch_function(
    fn: Callable[..., Any] | None = None,
    *,
    vmap_method: VmapMethod = "auto",
    residuals: Residuals = "live",
    forward_mode: bool = True,
    replay: bool = True,
    out_shape: Any = None,
    example_args: Sequence[Any] | None = None,
    engine: Engine = "torch",
    strict: bool = False,
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
    - `engine`: what computes. `"torch"`: torch itself, within XLA's programs; `"xla"`: JAX, op by op, of a graph that
      torch is traced to once per signature, so that XLA fuses, shards and exports it. Random numbers are other ones
      then, of the same distributions; `vmap_method`, `forward_mode` and `replay` have no meaning.
    - `strict`: with `engine="xla"`, an op that JAX has no function for is an error, and not computed by torch.

    **Returns:** a function of the same signature (and `key=`), returning what `fn` returns with `jax.Array`s for
    tensors, in the dtypes torch gives, canonicalised as JAX does. Without `fn`: a decorator.

    **Raises:** `TypeError` for arguments that do not fit the signature; `torchleaf.RandomnessError` when it draws
    random numbers without a key; `torchleaf.TorchCallError` when it cannot be traced or fails, with torch's message.

    Source: [`torch.func`](https://docs.pytorch.org/docs/stable/func.html),
    [`jax.extend.core.Primitive`](https://docs.jax.dev/en/latest/jax.extend.core.html).
    """
    options = CallOptions(vmap_method, residuals, forward_mode, replay, out_shape, example_args, engine, strict)
    return _made(options) if fn is None else _made(options)(fn)


def _made(options: CallOptions) -> Callable[[Callable[..., Any]], "TorchFunction"]:
    def make(fn: Callable[..., Any]) -> TorchFunction:
        if not callable(fn):
            raise TypeError(f"torch_function: fn must be callable, got {type(fn).__name__}.")
        if isinstance(fn, torch.nn.Module):
            raise TypeError(
                f"torch_function: fn is a torch.nn.Module ({type(fn).__name__}), whose parameters would be constants. "
                "Use torchleaf.TorchModule(module) to have them as leaves, or module.forward to keep them constant."
            )
        return TorchFunction(FunctionTarget(fn, _name_of(fn)), options)

    return make


@final
class TorchFunction:
    """A torch callable as a JAX function; made by `torch_function`, or of a module's method.

    **Arguments:**

    - `target`: what is called.
    - `options`: the user's.
    """

    def __init__(self, target: Target, options: CallOptions):
        self.target, self.options, self.name = target, options, target.name
        functools.update_wrapper(self, target.callable, updated=())
        self._forget()

    def calls(self) -> Iterator[TorchCall]:
        """The calls that it was traced to, and those derived from them."""
        for specialized in self._specialized.values():
            if isinstance(specialized, Specialized):
                yield from specialized.call.family()

    def carried(self) -> tuple[str, ...]:
        """The ops that torch computes in programs of the other engine."""
        graphs = [made.graph for made in self._specialized.values() if isinstance(made, Computed)]
        return tuple(dict.fromkeys(name for graph in graphs for name in graph.carried()))

    def _forget(self) -> None:
        """Be as one that was never called."""
        self.signature = Signature(self.target.callable, self.name)
        self._specialized: dict[Any, Specialized | Computed] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("signature", "_specialized")}

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
        if "key" in kwargs and not self.signature.wants_key(kwargs["key"], args):
            key = kwargs.pop("key")
        return self.apply(Arguments(args, kwargs, self.signature), key)[0]

    def apply(self, arguments: Arguments, key: Any = None, *, stateful: bool = False) -> tuple[Any, dict[int, Any]]:
        """Call with arguments already taken apart; the output, and new values of operands that are state.

        With `stateful` the caller keeps those values; otherwise a call that changes state is refused.
        """
        like = key.like if isinstance(key, DeferredKey) else key
        key_type = None if key is None else (getattr(like, "dtype", None), getattr(like, "shape", None))
        x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        device = device_here(arguments.operands)
        signature = (arguments.key, x64, device.type, autocast_here(), key_type, stateful)
        specialized = self._specialized.get(signature)
        if specialized is None:
            specialized = self._specialized[signature] = self._made_for(arguments, like, device, stateful=stateful)
        operands = arguments.operands
        if specialized.found.random:
            made = key.make() if isinstance(key, DeferredKey) else key
            operands = [*operands, key_operand(made, self.name)]
        is_computed = isinstance(specialized, Computed)
        results = specialized.program(*operands) if is_computed else bind(specialized.call, *operands)
        return specialized.found.rebuild(results)

    def _made_for(
        self, arguments: Arguments, key: Any, device: torch.device, *, stateful: bool
    ) -> Specialized | Computed:
        """What stands for the target at a new signature, by the engine that was chosen."""
        given = (self.target, self.options, arguments, key, device)
        if self.options.engine == "xla":
            return specialize_for_xla(*given, stateful=stateful, torch_function=_single_op)
        refuse_write = functools.partial(self._refuse_write, stateful=stateful)
        return specialize(*given, stateful=stateful, refuse_write=refuse_write)

    def _refuse_write(self, operands: Collection[int], *, stateful: bool) -> NoReturn:
        if stateful:
            self._specialized.clear()  # what is traced from now on returns their values, too
        self.target.refuse_write(operands, stateful=stateful)


def _single_op(fn: Callable[..., Any], name: str) -> "TorchFunction":
    """An op that the other engine lacks, as a JAX function."""
    return TorchFunction(FunctionTarget(fn, name), CallOptions())


def _is_found(function: Any) -> bool:
    """Whether it is what its module has by its name."""
    return found_by_name(getattr(function, "__module__", None), getattr(function, "__qualname__", "")) is function


def _name_of(fn: Callable[..., Any]) -> str:
    bound_to = getattr(fn, "__self__", None)
    name = getattr(fn, "__name__", type(fn).__qualname__)
    if isinstance(bound_to, torch.nn.Module):
        return f"{type(bound_to).__qualname__}.{name}"
    return name if inspect.isbuiltin(fn) else getattr(fn, "__qualname__", name)
