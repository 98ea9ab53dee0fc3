"""`torch_function`: a torch callable as a JAX function over pytrees."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from . import dtypes
from .arrays import array_to_torch
from .call import Aval, Base, Tensors, VmapMethod
from .errors import TorchCallError
from .primitive import bind
from .signature import Signature
from .trace import Trace, trace
from .trees import flatten_registering

_VMAP_METHODS = ("auto", "vmap", "batched", "loop")


def torch_function(
    fn: Callable[..., Any] | None = None,
    *,
    vmap_method: VmapMethod = "auto",
    forward_mode: bool = True,
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
    argument in place stays inside the call.

    **Arguments:**

    - `fn`: any callable over tensors, bound methods included. Its positional and keyword arguments may be any pytrees;
      `jax.Array` and NumPy leaves become tensors of the same shape and dtype (without `jax_enable_x64`, int32 arrives
      as torch's default int64), every other leaf (bool, number, string, None, dtype) is passed as it is and is static.
    - `vmap_method`: what `jax.vmap` does. `"vmap"`: `torch.func.vmap`; `"batched"`: one call with the batch axis
      leading in every batched array, for a function that takes batches itself; `"loop"`: example by example inside
      one call; `"auto"`: `"vmap"` where torch has the batching rules, otherwise `"loop"`, with a warning.
    - `forward_mode`: with False, derivatives go through `jax.custom_vjp` and forward mode raises JAX's message;
      for torch code that has no forward-mode formula.
    - `out_shape`: a pytree of `jax.ShapeDtypeStruct` like the output, for a function that inspects values
      and so cannot be traced without computing.
    - `example_args`: positional arguments to run such a function on once instead, for its output shapes.

    **Returns:** a function of the same signature, returning what `fn` returns with `jax.Array`s for tensors, in the
    dtypes torch gives, canonicalised as JAX does. Without `fn`: a decorator.

    **Raises:** `TypeError` for arguments that do not fit the signature; `torchleaf.TorchCallError` when the function
    cannot be traced or fails, with torch's own message.

    Source: [`torch.func`](https://docs.pytorch.org/docs/stable/func.html),
    [`jax.extend.core.Primitive`](https://docs.jax.dev/en/latest/jax.extend.core.html).
    """
    options = {
        "vmap_method": vmap_method,
        "forward_mode": forward_mode,
        "out_shape": out_shape,
        "example_args": example_args,
    }
    if fn is None:
        return lambda fn: TorchFunction(fn, **options)
    return TorchFunction(fn, **options)


class TorchFunction:
    """A torch callable as a JAX function; made by `torch_function`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        signature: Signature | None = None,
        vmap_method: VmapMethod = "auto",
        forward_mode: bool = True,
        out_shape: Any = None,
        example_args: Sequence[Any] | None = None,
    ):
        if not callable(fn):
            raise TypeError(f"torch_function: fn must be callable, got {type(fn).__name__}.")
        if isinstance(fn, torch.nn.Module):
            raise TypeError(
                f"torch_function: fn is a torch.nn.Module ({type(fn).__name__}), whose parameters would be constants. "
                "Use torchleaf.TorchModule(module) to have them as leaves, or pass module.forward to keep them constant."
            )
        if vmap_method not in _VMAP_METHODS:
            raise ValueError(f"vmap_method must be one of {_VMAP_METHODS}, got {vmap_method!r}.")
        self.name = name or _name_of(fn)
        self._fn, self._vmap_method, self._forward_mode = fn, vmap_method, forward_mode
        self._out_shape, self._example_args = out_shape, example_args
        self._signature = signature or Signature(fn, self.name)
        self._specialized: dict[Any, _Specialized] = {}
        functools.update_wrapper(self, fn, updated=())

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"torch_function({self.name})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, treedef = flatten_registering((args, kwargs))
        is_array = tuple(map(_is_array, leaves))
        operands = [_as_operand(leaf) for leaf, arr in zip(leaves, is_array, strict=True) if arr]
        avals = tuple(Aval(x.shape, x.dtype) for x in operands)
        static = tuple(_static_key(leaf) for leaf, arr in zip(leaves, is_array, strict=True) if not arr)
        key = (treedef, is_array, avals, static, jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            specialized = self._specialized.get(key)
        except TypeError:
            self._reject_unhashable(args, kwargs, leaves, is_array)
            raise
        if specialized is None:
            specialized = self._specialize(treedef, leaves, is_array, operands, avals)
            self._specialized[key] = specialized
        return specialized.rebuild(bind(specialized.call, *operands))

    # Hooks for callables whose first argument is a module's weights.

    def operand_dtypes(self, avals: Sequence[Aval]) -> list[torch.dtype]:
        """The torch dtypes the flat operands arrive in."""
        return [dtypes.operand_dtype(a.dtype) for a in avals]

    def observed(self, *args: Any, **kwargs: Any) -> Any:
        """The callable as it runs while it is traced."""
        return self._fn(*args, **kwargs)

    def check(self, found: Trace) -> None:
        """Refuse what the trace found and the call cannot do."""

    def _specialize(
        self, treedef: Any, leaves: list[Any], is_array: tuple[bool, ...], operands: list[Any], avals: tuple[Aval, ...]
    ) -> "_Specialized":
        """Trace the callable for one signature."""
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        self._signature.check(args, kwargs)
        names = [n for n, arr in zip(self._signature.leaf_names(args, kwargs), is_array, strict=True) if arr]
        wanted = self.operand_dtypes(avals)
        statics = [None if arr else leaf for leaf, arr in zip(leaves, is_array, strict=True)]

        def arguments(tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            feed = iter(tensors)
            filled = [next(feed) if arr else leaf for leaf, arr in zip(statics, is_array, strict=True)]
            return jax.tree.unflatten(treedef, filled)

        def observed(*tensors: torch.Tensor) -> Any:
            args, kwargs = arguments(tensors)
            return self.observed(*args, **kwargs)

        found = trace(
            observed,
            [(a.shape, d) for a, d in zip(avals, wanted, strict=True)],
            name=self.name,
            operand_names=names,
            out_shape=self._out_shape,
            example=lambda: self._example(operands, wanted),
        )
        self.check(found)
        out_dtypes = [dtypes.to_torch_dtype(a.dtype) for a in found.out_avals]

        def flat(*tensors: torch.Tensor) -> Tensors:
            received = [
                (x.to(d).clone() if i in found.mutated else x.to(d))
                for i, (x, d) in enumerate(zip(tensors, wanted, strict=True))
            ]
            args, kwargs = arguments(received)
            leaves, out_treedef = flatten_registering(self._fn(*args, **kwargs))
            if out_treedef != found.treedef:
                raise TorchCallError(
                    f"{self.name} returned {out_treedef} at run time, but {found.treedef} when it was traced (or "
                    "declared by `out_shape`). The structure of the output must not depend on values."
                )
            outs = [y for y in leaves if isinstance(y, torch.Tensor)]
            return tuple(y.to(d) for y, d in zip(outs, out_dtypes, strict=True))

        call = Base(
            flat,
            name=self.name,
            in_avals=avals,
            out_avals=found.out_avals,
            fakeable=found.fakeable,
            fused_kernels=found.fused_kernels,
            forward_mode=self._forward_mode,
            vmap_method=self._vmap_method,
        )
        return _Specialized(call, found)

    def _example(self, operands: Sequence[Any], wanted: Sequence[torch.dtype]) -> list[torch.Tensor] | None:
        """Values to run the callable on once: `example_args`, or the arguments if they are not traced."""
        if self._example_args is not None:
            operands = [_as_operand(x) for x in jax.tree.leaves(self._example_args) if _is_array(x)]
        if any(isinstance(x, jax.core.Tracer) for x in operands):
            return None
        return [array_to_torch(x, copy=True).to(d) for x, d in zip(operands, wanted, strict=True)]

    def _reject_unhashable(self, args: Any, kwargs: Any, leaves: list[Any], is_array: tuple[bool, ...]) -> None:
        for name, leaf, arr in zip(self._signature.leaf_names(args, kwargs), leaves, is_array, strict=True):
            if not arr and type(leaf).__hash__ is None:
                raise TypeError(
                    f"{self.name}: argument {name} is a {type(leaf).__name__}, neither an array nor hashable, so it "
                    "cannot be static. Pass arrays, pytrees of arrays, or hashable values."
                )


class _Specialized:
    """One signature of a `TorchFunction`: the call, and how its flat results become the output."""

    def __init__(self, call: Base, found: Trace):
        self.call, self._treedef, self._leaves = call, found.treedef, found.leaves

    def rebuild(self, results: Sequence[Any]) -> Any:
        feed = iter(results)
        leaves = [next(feed) if isinstance(leaf, Aval) else leaf for leaf in self._leaves]
        return jax.tree.unflatten(self._treedef, leaves)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _as_operand(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _static_key(leaf: Any) -> Any:
    """A key that tells apart what `==` does not: 1, 1.0 and True; 0.0 and -0.0."""
    if isinstance(leaf, torch.Tensor):
        raise TypeError(
            f"an argument is a torch.Tensor of shape {tuple(leaf.shape)}; torchleaf functions take JAX arrays. "
            "Convert it with torchleaf.to_jax(tensor)."
        )
    return (type(leaf), repr(leaf) if isinstance(leaf, float | complex) else leaf)


def _name_of(fn: Callable[..., Any]) -> str:
    bound_to = getattr(fn, "__self__", None)
    own = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    if isinstance(bound_to, torch.nn.Module):
        return f"{type(bound_to).__qualname__}.{getattr(fn, '__name__', own)}"
    return own
