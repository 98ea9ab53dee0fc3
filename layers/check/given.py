"""The user's module or function, and the user's arguments moved a little from call to call."""

import random
from collections.abc import Callable
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer

from ...interop.internals.modules import DropoutNd
from ...interop.types import CallOptions
from ...interop.values import dtypes
from ...interop.values.arrays import array_to_torch
from ...interop.values.dtypes import is_inexact_tensor
from ...interop.values.trees import flatten_registering
from ..module.channels_last import to_flax_layout, to_torch_layout
from ..module.functional_module import FunctionalModule
from ..module.skeleton import in_mode, named_tensors
from .kinds import Called, Kind
from .subject import Subject, like, map_tensors, widened
from .wrapped import Wrapped

_AMOUNT = 1e-2
"""How far arguments are moved, in relation to each element."""
_CALLS = 5


class Given(Subject):
    """What the user gave to `check`.

    **Arguments:**

    - `kind`: the module or function.
    - `args`: the user's arguments.
    - `key`: the user's key, if any.
    """

    smooth = None
    not_asked = MappingProxyType({})

    def __init__(self, kind: Kind, args: tuple[Any, ...], key: Any):
        self._kind, self._key, self.notes = kind, key, list[str]()
        self._snapshot = _Snapshot(kind)
        self.name, self.forward_mode = self._snapshot.name, kind.forward_mode
        self._args = jax.tree.map(self._tensor, _registered(args))
        self._moves = True
        self.output = _itself
        self._quiet: Callable[[torch.nn.Module], Any] | None = _itself
        self.random = self._draws(_itself)
        if self.random:
            self._settle_randomness()
        self._settle_moves()

    # --- as a subject --------------------------------------------------------------------------------

    def module(self, *, double: bool = False, drawing: bool = False) -> torch.nn.Module:
        module = self._snapshot.module()
        if not drawing and self._quiet is not None:
            self._quiet(module)
        return module._apply(widened) if double else module

    def reference(self, *, double: bool = False, drawing: bool = False) -> torch.nn.Module:
        module = self.module(double=double, drawing=drawing)
        if self._kind.channels_last:
            module.register_forward_pre_hook(lambda _, args: to_torch_layout(args))
            module.register_forward_hook(lambda _, args, output: to_flax_layout(output))
        return module

    def arguments(self, number: int, *, double: bool = False) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(number)

        def moved(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            return _moved(x, generator) if number and self._moves else x

        args = map_tensors(moved, self._args)
        return map_tensors(widened, args) if double else args

    @cached_property
    def _has_floats(self) -> bool:
        return any(isinstance(x, torch.Tensor) and is_inexact_tensor(x) for x in jax.tree.leaves(self._args))

    def batched(self, x: torch.Tensor) -> bool:
        return is_inexact_tensor(x) if self._has_floats else x.dtype != torch.bool

    def wrap(self, module: torch.nn.Module, args: tuple[Any, ...], *, double: bool, stateful: bool) -> Wrapped:
        return self._kind.wrap(module, args, double=double, stateful=stateful)

    def key(self) -> jax.Array:
        return jax.random.key(0) if self._key is None else self._key

    # --- what is found out at first ------------------------------------------------------------------

    def _tensor(self, leaf: Any) -> Any:
        """A leaf as torch is to see it, on the module's device; static values as they are."""
        if isinstance(leaf, Tracer):
            raise TypeError("check: an argument is traced; call check outside of JAX's transformations.")
        if isinstance(leaf, np.ndarray | np.generic) and dtypes.has_torch_dtype(leaf.dtype):
            leaf = jax.numpy.asarray(leaf)
        if isinstance(leaf, jax.Array):
            leaf = array_to_torch(leaf, copy=True)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.detach().clone().to(self._snapshot.device)
        if self._snapshot.computes_in_double:
            return widened(leaf)
        return leaf.to(dtypes.operand_dtype(dtypes.canonical(leaf.dtype)))

    def _settle_randomness(self) -> None:
        """Find the mode that draws no numbers: torch's could not be compared."""
        for quiet, how in ((_without_dropout, "without dropout"), (_evaluating, "in evaluation mode")):
            if not self._draws(quiet):
                self._quiet = quiet
                self.notes.append(f"It draws random numbers: all but 'keys' is checked {how}.")
                break
        else:
            self._quiet, self.cannot_compare = None, "it draws random numbers; see 'keys'"
        if self._key is None:
            self.notes.append("It draws random numbers and no key was given: jax.random.key(0) is taken.")

    def _draws(self, mode: Callable[[torch.nn.Module], Any]) -> bool:
        module = self._snapshot.module()
        mode(module)
        before = _generators()
        try:
            self._as_reference(module)(*self.arguments(0))
        except Exception as exc:
            raise ValueError(
                f"check: torch itself fails on {self.name} with these arguments: {type(exc).__name__}: {exc}\n"
                "Pass the positional arguments of one call, with arrays or tensors in any pytree."
            ) from exc
        return any(not np.array_equal(a, b) for a, b in zip(before, _generators(), strict=True))

    def _settle_moves(self) -> None:
        """Leave arguments alone that may have no others nearby, such as probabilities that sum to one."""
        try:
            for number in range(1, 1 + _CALLS):
                self._as_reference(self.module())(*self.arguments(number))
        except Exception as exc:
            self._moves = False
            first = str(exc).split("\n")[0]
            self.notes.append(f"All calls get the same arguments, since torch refuses others nearby: {first}")

    def _as_reference(self, module: torch.nn.Module) -> Callable[..., Any]:
        if not self._kind.channels_last:
            return module
        return lambda *args: module(*to_torch_layout(args))


class _Snapshot:
    """The user's module as it is now, to be made again as often as is wanted."""

    def __init__(self, kind: Kind):
        self._made: FunctionalModule | None = None
        self.computes_in_double = False
        if isinstance(kind.module, Called):
            self._called, self.device = kind.module, torch.device("cpu")
            self.name = kind.module.name
            return
        self._made = FunctionalModule(kind.module, remedy="", options=CallOptions())
        weights, self.computes_in_double = named_tensors(kind.module), self._made.computes_in_double
        self._weights = {name: x.detach().clone() for name, x in weights}
        self._training, self.name = kind.training, f"{type(kind.module).__name__} ({kind.framework})"
        self.device = weights[0][1].device if weights else torch.device("cpu")

    def module(self) -> torch.nn.Module:
        """A copy; of a function, a module that calls it."""
        if self._made is None:
            return self._called
        weights = {name: x.clone() for name, x in self._weights.items()}
        module = self._made.with_weights(weights, training=self._made.training)
        return in_mode(module, training=self._training)


def _registered(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments, once JAX knows all containers among them."""
    flatten_registering(args)
    return args


def _itself(x: Any) -> Any:
    return x


def _without_dropout(module: torch.nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, DropoutNd):
            part.eval()


def _evaluating(module: torch.nn.Module) -> None:
    module.eval()


def _moved(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tensor whose floats are a little different; whole numbers stay, in another order along the last axis."""
    if not is_inexact_tensor(x):
        turns = int(torch.randint(max(1, x.shape[-1]), (), generator=generator)) if x.ndim else 0
        return x.roll(turns, -1) if turns and x.dtype != torch.bool else x
    noise = _AMOUNT * like(torch.randn(x.shape, generator=generator).to(x.device), x)
    return (x * (1 + noise) if bool((x != 0).any()) else x + noise).to(x.dtype)


def _generators() -> list[np.ndarray]:
    """The states of the generators that torch code draws from."""
    _, words, position, *_ = np.random.get_state()
    states = [torch.get_rng_state().numpy(), np.array(random.getstate()[1]), np.array([*words, position])]
    if torch.cuda.is_initialized():
        states += [x.numpy() for x in torch.cuda.get_rng_state_all()]
    return states
