"""A `torch.nn.Module` taken apart: its weights as a flat dict of arrays, the rest as a skeleton.

The skeleton is a copy of the module whose parameters and buffers lie on the meta device. A call puts
tensors in their place as `torch.func.functional_call` does, in a copy that no other thread is using.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import torch
from torch.nn.parameter import is_lazy

from ..interop import dtypes
from ..interop.arguments import Arguments, Filler
from ..interop.arrays import tensor_to_jax
from ..interop.call import Aval
from ..interop.errors import CapturedWriteError, StateError, TorchCallError
from ..interop.function import Flat, TorchFunction, check_options
from ..interop.trace import Trace
from .attributes import attribute_changes, attribute_values, put_back, stray_tensors
from .skeleton import Skeleton, SkeletonPool, copy_replacing, in_mode, named_tensors

Kind = Literal["params", "frozen", "buffers"]
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Spec:
    """One parameter or buffer: what torch says of it."""

    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype


class FunctionalModule:
    """The static part of a torch module: code, hyperparameters and weight specs, no weights.

    Compared and hashed by identity.

    **Arguments:**

    - `module`: an initialised `torch.nn.Module`; it is left as it is.
    - `options`: those of `torch_function`.
    """

    def __init__(self, module: torch.nn.Module, **options: Any):
        _check_module(module)
        _warn_of_compilation_in_place(module)
        check_options(options["vmap_method"], options["residuals"])
        self.name = type(module).__name__
        self.training = module.training
        self.specs = {name: Spec(_kind(t), tuple(t.shape), t.dtype) for name, t in named_tensors(module)}
        self._options = options
        self.skeleton = copy_replacing(module, {t: _on_meta(t) for _, t in named_tensors(module)})
        self._functions: dict[tuple[str, bool], TorchFunction] = {}
        self._pools: dict[bool, SkeletonPool] = {}

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def function(self, method: str, inference: bool) -> TorchFunction:
        """The module's `method` as a JAX function of `(weights, *args, **kwargs)`."""
        key = (method, inference)
        if key not in self._functions:
            if not callable(getattr(self.skeleton, method, None)):
                raise AttributeError(f"{self.name} has no method {method!r}.")
            if inference not in self._pools:
                self._pools[inference] = SkeletonPool(self.skeleton, training=not inference)
            self._functions[key] = _ModuleFunction(self, method, self._pools[inference])
        return self._functions[key]

    def leaves(self, module: torch.nn.Module, *, copy: bool) -> dict[Kind, dict[str, jax.Array]]:
        """The weights of `module` as jax arrays, by kind and torch name: views where JAX can view them."""
        leaves: dict[Kind, dict[str, jax.Array]] = {"params": {}, "frozen": {}, "buffers": {}}
        for name, tensor in named_tensors(module):
            leaves[self.specs[name].kind][name] = tensor_to_jax(tensor, copy=copy, name=f"{self.name}.{name}")
        return leaves

    def state_names(self) -> dict[str, str]:
        """torch's state dict names, in its order, with the leaf behind each: tied weights share one."""
        leaf_of = {id(t): name for name, t in named_tensors(self.skeleton)}
        return {
            name: leaf_of[id(t)] for name, t in self.skeleton.state_dict(keep_vars=True).items() if id(t) in leaf_of
        }

    def with_weights(self, weights: Weights, *, training: bool) -> torch.nn.Module:
        """A plain torch module carrying `weights`, in training or evaluation mode."""
        replacements = {}
        for name, meta in named_tensors(self.skeleton):
            is_parameter = isinstance(meta, torch.nn.Parameter)
            tensor = weights[name]
            replacements[meta] = torch.nn.Parameter(tensor, meta.requires_grad) if is_parameter else tensor
        return in_mode(copy_replacing(self.skeleton, replacements), training=training)

    def same_structure(self, other: "FunctionalModule") -> bool:
        """Whether both compute the same function of their weights, as far as torch prints them."""
        return (
            self.specs == other.specs
            and self._options == other._options
            and repr(self.skeleton) == repr(other.skeleton)
        )


class _ModuleFunction(TorchFunction):
    """One method of a module in one mode; its leading operands are the weights, sorted by name."""

    def __init__(self, module: FunctionalModule, method: str, pool: SkeletonPool):
        self._module, self._method, self._pool = module, method, pool
        self._names = sorted(module.specs)
        self._assigned: set[tuple[str, str]] = set()
        name = module.name if method == "forward" else f"{module.name}.{method}"
        super().__init__(getattr(module.skeleton, method), name=name, **module._options)

    def __call__(self, weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        leading = {name: weights.get(name) for name in self._names}
        missing = [name for name, leaf in leading.items() if leaf is None]
        if missing:
            raise TypeError(
                f"{self.name}: leaf {missing[0]!r} is missing from the model. If it was partitioned, put it together "
                "again before the call: `eqx.combine(params, static)`."
            )
        return self.apply(Arguments(args, kwargs, self._signature, leading))

    def runner(self, fill: Filler) -> Flat:
        n_weights, pool, method = len(self._names), self._pool, self._method

        def run(*tensors: torch.Tensor) -> Any:
            weights = tensors[:n_weights]
            args, kwargs = fill(tensors[n_weights:])
            skeleton = pool.borrow()
            before = attribute_values(skeleton.module, self._assigned) if self._assigned else []
            skeleton.load(weights)
            try:
                call = skeleton.module if method == "forward" else getattr(skeleton.module, method)
                output = call(*args, **kwargs)
            finally:
                replaced = skeleton.unload(weights)
                put_back(before)
                pool.give_back(skeleton)
            if replaced is not None:
                raise _state_error(self.name, f"buffer `{replaced}`")
            return output

        return run

    def observer(self, fill: Filler) -> Flat:
        """Run by `torch.func.functional_call`, the definition of a call, and learn which attributes are assigned."""

        def observe(*tensors: torch.Tensor) -> Any:
            weights = dict(zip(self._names, tensors[: len(self._names)], strict=True))
            args, kwargs = fill(tensors[len(self._names) :])
            self._check_shapes(weights)
            skeleton = self._pool.borrow()
            output = self._observe(skeleton, weights, args, kwargs)
            self._pool.give_back(skeleton)  # one in which the forward failed is not used again
            return output

        return observe

    def _observe(
        self, skeleton: Skeleton, weights: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        module, inputs = skeleton.module, [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        with attribute_changes(module) as changes:
            try:
                output = self._functional_call(module, weights, args, kwargs)
            except CapturedWriteError as exc:
                skeleton.reset()
                attribute = next(stray_tensors(module, aliasing=[exc.tensor]), None)
                if attribute is None:  # a closure or a global holds it
                    raise
                raise _state_error(self.name, f"attribute `{attribute}`") from exc
            skeleton.reset()  # functional_call leaves a module that stands in two places with tensors in it
            attribute = next(stray_tensors(module, aliasing=inputs), None)
            if attribute is not None:
                raise TorchCallError(
                    f"{self.name} keeps an argument, or a view of it, in its attribute `{attribute}`, whose memory "
                    "belongs to XLA and is reused at once. Return the tensor as an output, or store `tensor.clone()`."
                )
        for change in changes:
            if change.is_state:
                raise _state_error(self.name, f"attribute `{change.path}{change.name}`")
            self._assigned.add((change.path, change.name))
        attribute = next(stray_tensors(module, fake=True), None)
        if attribute is not None:
            raise _state_error(self.name, f"attribute `{attribute}`")
        return output

    def _functional_call(
        self, module: torch.nn.Module, weights: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._method == "forward":
            caller, given = module, weights
        else:
            caller, given = _MethodCaller(module, self._method), {f"module.{n}": t for n, t in weights.items()}
        held = dict(given)
        output = torch.func.functional_call(caller, held, args, kwargs)
        for name, tensor in held.items():
            if tensor is not given[name]:  # functional_call hands back what the forward put in its place
                raise _state_error(self.name, f"buffer `{name.removeprefix('module.')}`")
        return output

    def operand_dtypes(self, avals: Sequence[Aval]) -> list[torch.dtype]:
        """Each weight's own torch dtype, unless the user cast the leaf to another one."""
        specs = [self._module.specs[name] for name in self._names]
        restored = [
            s.dtype if a.dtype == dtypes.canonical(s.dtype) else dtypes.to_torch_dtype(a.dtype)
            for a, s in zip(avals, specs, strict=False)
        ]
        return restored + super().operand_dtypes(avals[len(specs) :])

    def check(self, found: Trace) -> None:
        for i, name in enumerate(self._names):
            if i in found.mutated and self._module.specs[name].kind == "buffers":
                raise _state_error(self.name, f"buffer `{name}`")

    def _check_shapes(self, weights: Weights) -> None:
        for name, spec in self._module.specs.items():
            if tuple(weights[name].shape) != spec.shape:
                raise TorchCallError(
                    f"{self.name}: leaf {name!r} has shape {tuple(weights[name].shape)}, but the torch module's is "
                    f"{spec.shape}. A stacked model is called under vmap over its leaves, e.g. "
                    "`eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(model, x)`."
                )


class _MethodCaller(torch.nn.Module):
    """Makes another method than `forward` reachable for `functional_call`."""

    def __init__(self, module: torch.nn.Module, method: str):
        super().__init__()
        self.module, self._method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self._method)(*args, **kwargs)


def _kind(tensor: torch.Tensor) -> Kind:
    if not isinstance(tensor, torch.nn.Parameter):
        return "buffers"
    return "params" if tensor.requires_grad else "frozen"


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    meta = torch.empty_like(tensor, device="meta", requires_grad=False)
    return torch.nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else meta


def _check_module(module: Any) -> None:
    if not isinstance(module, torch.nn.Module):
        hint = " (a class: pass an instance)" if isinstance(module, type) else ""
        raise TypeError(f"TorchModule: module must be a torch.nn.Module, got {type(module).__name__}{hint}.")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"TorchModule: {type(module).__name__} is a TorchScript module, whose weights cannot be taken out of its "
            "compiled code. Wrap the Python module it was scripted from."
        )
    for name, tensor in named_tensors(module):
        if is_lazy(tensor):
            raise TypeError(
                f"TorchModule: {type(module).__name__}.{name} is uninitialised (a lazy module). Run the torch module "
                "once on an example input before wrapping it."
            )
        if dtypes.canonical(tensor.dtype) != dtypes.to_jax_dtype(tensor.dtype) and not _is_integer(tensor.dtype):
            raise TypeError(
                f"TorchModule: {type(module).__name__}.{name} is {tensor.dtype}, which JAX has only with "
                "`jax.config.update('jax_enable_x64', True)`. Enable it, or wrap `module.float()`."
            )


def _warn_of_compilation_in_place(module: torch.nn.Module) -> None:
    if any(part._compiled_call_impl is not None for part in module.modules()):
        warnings.warn(
            f"TorchModule: {type(module).__name__} or a part of it was compiled in place (`module.compile()`), which "
            "torch does not carry over to a copy: it will run uncompiled. Wrap `torch.compile(module)` instead.",
            stacklevel=4,
        )


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def _state_error(name: str, what: str) -> StateError:
    return StateError(
        f"{name} changes {what} in its forward pass, which a pure function would silently lose. State is not supported "
        "yet: use evaluation mode (`eqx.nn.inference_mode(model)`, or `module.eval()` before wrapping), in which "
        "layers like BatchNorm do not update. If the module prepares itself on its first call, call it once before "
        "wrapping it."
    )
