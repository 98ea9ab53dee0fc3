"""A `torch.nn.Module` taken apart: its weights as a flat dict of arrays, the rest as a skeleton.

The skeleton is a copy of the module whose parameters and buffers lie on the meta device. A call puts tensors in their
place as `torch.func.functional_call` does, in a copy that no other thread is using.
"""

import sys
import threading
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import torch

from ...interop.errors import StateError
from ...interop.function import TorchFunction
from ...interop.modes.random import PASS_A_KEY
from ...interop.types import CallOptions
from ...interop.values.arrays import leaves_to_jax
from ...interop.values.memory import storage_of
from ...interop.values.names import signature_of
from .admission import check_module, computes_in_double
from .copying import Copier
from .fingerprint import fingerprint
from .gradient_hooks import copy_hooks, register_hooks
from .module_function import ModuleFunction, Weights
from .originals import Originals
from .places import StandIns
from .skeleton import SkeletonPool, in_mode, is_training, named_tensors

Kind = Literal["params", "frozen", "buffers"]


@dataclass(frozen=True)
class Spec:
    """One parameter or buffer: what torch says of it."""

    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype


class FunctionalModule:
    """The static part of a torch module: code, hyperparameters and weight specs, no weights.

    Two are equal if their modules are built alike (`fingerprint.py`); then they share their traces, too.

    **Arguments:**

    - `module`: an initialised `torch.nn.Module`; it is left as it is.
    - `remedy`: what to do, in the terms of one's framework, where buffers change.
    - `key_remedy`: likewise, where random numbers are drawn without a key.
    - `channels_last`: arrays have their channels in the last axis, torch's tensors in the second.
    - `options`: the user's.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        remedy: str,
        key_remedy: str = PASS_A_KEY,
        channels_last: bool = False,
        options: CallOptions,
    ):
        check_module(module)
        weights = named_tensors(module)
        self.name = type(module).__name__
        self.training, self.computes_in_double = is_training(module), computes_in_double(weights)
        self.specs = {name: Spec(_kind(t), tuple(t.shape), t.dtype) for name, t in weights}
        self.options, self.remedy, self.key_remedy, self.channels_last = options, remedy, key_remedy, channels_last
        found = StandIns(weights)
        copier = Copier(module, {t: _on_meta(t) for _, t in weights}, found.of)
        self.skeleton = copier.copied()
        copy_hooks(weights, self.skeleton, copier)
        self.stand_ins, self.originals = found.made, Originals(weights)
        _prepare(self.skeleton)
        self._forget()

    def _forget(self) -> None:
        """Be as one that was never called or compared."""
        self._lock = threading.RLock()
        self._equal: FunctionalModule | None = None
        self._functions: dict[tuple[str, bool], ModuleFunction] = {}
        self._arguments: dict[str, frozenset[str]] = {}
        self._pools: dict[bool, SkeletonPool] = {}

    def __repr__(self) -> str:
        return f"<{self.name}>"

    # --- as a static value of JAX --------------------------------------------------------------------

    @property
    def canonical(self) -> "FunctionalModule":
        """The first of those that equal this one; it has the functions of them all."""
        if self._equal is None:
            with self._lock:
                self._equal = self._equal or self._find_equal()
        return self._equal

    def _find_equal(self) -> "FunctionalModule":
        code = fingerprint(self.skeleton, dict(named_tensors(self.skeleton)), self.stand_ins)
        rest = (self.name, self.remedy, self.key_remedy, self.channels_last, self.options.key)
        with _canonical_lock:
            found = _canonical.setdefault((code, tuple(self.specs.items()), rest), self)
        if found is not self:
            found.originals.add(self.originals)
            self.skeleton, self.stand_ins = found.skeleton, found.stand_ins
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionalModule) and self.canonical is other.canonical

    def __hash__(self) -> int:
        return id(self.canonical)

    def __deepcopy__(self, memo: Any) -> "FunctionalModule":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.originals = Originals([])
        self._forget()

    # --- as functions --------------------------------------------------------------------------------

    def function(self, method: str, inference: bool) -> ModuleFunction:
        """The module's `method` as a JAX function of weights and arguments."""
        if self.canonical is not self:
            return self.canonical.function(method, inference)
        key = (method, inference)
        if key not in self._functions:
            if not callable(getattr(self.skeleton, method, None)):
                raise AttributeError(f"{self.name} has no method {method!r}.")
            if inference not in self._pools:
                self._pools[inference] = SkeletonPool(self.skeleton, self.stand_ins, training=not inference)
            self._functions[key] = ModuleFunction(self, method, self._pools[inference])
        return self._functions[key]

    def functions(self) -> list[TorchFunction]:
        """Those of its methods that were called."""
        return [method.function for method in self.canonical._functions.values()]

    def stand_alone(self) -> None:
        """Equal no other, so that it shares no traces; before it is called or compared."""
        self._equal = self

    def arguments(self, method: str) -> frozenset[str]:
        """The names of a method's arguments; none if there is no such method."""
        if method not in self._arguments:
            function = getattr(self.skeleton, method, None)
            signature = signature_of(function) if callable(function) else None
            self._arguments[method] = frozenset(signature.parameters if signature else ())
        return self._arguments[method]

    def foreign(self) -> dict[int, str]:
        """Storages that no call may read, each with the weight that it is of, or the attribute."""
        metas = {meta: stand_in.name for meta, stand_in in self.stand_ins.items()}
        metas |= {meta: name for name, meta in named_tensors(self.skeleton)}
        return {**self.originals.named(), **{storage_of(meta): name for meta, name in metas.items()}}

    def lost_attribute(self, name: str, attribute: str) -> StateError:
        """The error for an attribute that the forward changes."""
        return StateError(
            f"{name} changes attribute `{attribute}` in its forward pass, which a pure function would silently lose. "
            "Make it a buffer (`register_buffer`) if it is state; if the module prepares itself on its first call, "
            "call it once before wrapping it."
        )

    # --- weights -------------------------------------------------------------------------------------

    def fits(self, kind: Kind, leaves: Mapping[str, Any]) -> bool:
        """Whether leaves are, by names and shapes, the weights of one kind, or several such stacked."""
        shapes = {name: spec.shape for name, spec in self.specs.items() if spec.kind == kind}
        return shapes.keys() == leaves.keys() and all(
            tuple(leaves[name].shape[leaves[name].ndim - len(shape) :]) == shape for name, shape in shapes.items()
        )

    def leaves(self, module: torch.nn.Module, *, copy: bool) -> dict[Kind, dict[str, jax.Array]]:
        """The weights of `module` as jax arrays, by kind and torch name: views where JAX can view them."""
        arrays = leaves_to_jax({f"{self.name}.{name}": x for name, x in named_tensors(module)}, copy=copy)
        leaves: dict[Kind, dict[str, jax.Array]] = {"params": {}, "frozen": {}, "buffers": {}}
        for name, leaf in arrays.items():
            own = name.removeprefix(f"{self.name}.")
            leaves[self.specs[own].kind][own] = leaf
        return leaves

    def with_weights(self, weights: Weights, *, training: bool) -> torch.nn.Module:
        """A plain torch module carrying `weights`, in training or evaluation mode."""
        metas = named_tensors(self.skeleton)
        given = {name: _like(meta, weights[name]) for name, meta in metas}
        replacements = {meta: given[name] for name, meta in metas}
        replacements |= {meta: stand_in.of(given) for meta, stand_in in self.stand_ins.items()}
        module = in_mode(Copier(self.skeleton, replacements).copied(), training=training)
        register_hooks(module, given)
        return module

    def of_module(self, module: torch.nn.Module) -> "FunctionalModule":
        """Another module, with the same options; this one, if that is built alike."""
        other = FunctionalModule(
            module,
            remedy=self.remedy,
            key_remedy=self.key_remedy,
            channels_last=self.channels_last,
            options=self.options,
        )
        return self if other == self else other


_OF_A_PROCESS = ("_lock", "_equal", "_functions", "_arguments", "_pools", "originals")
_canonical: "weakref.WeakValueDictionary[Hashable, FunctionalModule]" = weakref.WeakValueDictionary()
_canonical_lock = threading.Lock()


def _prepare(skeleton: torch.nn.Module) -> None:
    """What transformers does to a model in its first call that returns hidden states: install hooks to collect them."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is not None:
        for part in skeleton.modules():
            if hasattr(type(part), "_can_record_outputs"):
                capturing.maybe_install_capturing_hooks(part)


def _kind(tensor: torch.Tensor) -> Kind:
    if not isinstance(tensor, torch.nn.Parameter):
        return "buffers"
    return "params" if tensor.requires_grad else "frozen"


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return _like(tensor, torch.empty_like(tensor, device="meta", requires_grad=False))


def _like(weight: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a parameter, if the weight is one."""
    is_parameter = isinstance(weight, torch.nn.Parameter)
    return torch.nn.Parameter(tensor, weight.requires_grad) if is_parameter else tensor
