"""What a wrapped torch module can do in every framework."""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import optax
import torch
import torchleaf

Leaves = dict[str, jax.Array]
Program = Callable[..., Any]
"""Called with a model and inputs, which are pytrees with static leaves, too."""


class Weights(NamedTuple):
    """Leaves by torch name, or their gradients."""

    params: Leaves
    frozen: Leaves
    buffers: Leaves

    @property
    def all(self) -> Leaves:
        return {**self.params, **self.frozen, **self.buffers}


class Gradients(NamedTuple):
    """What `Model.gradients` gives: those of inexact leaves."""

    value: jax.Array
    aux: Any
    weights: Weights
    inputs: list[jax.Array]


class Model(ABC):
    """A torch module wrapped for one framework, and its state."""

    name: str
    key_remedy: str
    """What the framework's users do about a missing key, as its error says."""
    state_remedy: str = "-"
    """Likewise, where there is no place for state."""

    @abstractmethod
    def __init__(self, module: torch.nn.Module, *, with_state: bool = False, copy: bool = False, **options: Any):
        """`with_state`: give changed buffers a place, where the framework does not always do so."""

    @abstractmethod
    def __call__(self, *args: Any, key: Any = None, method: str = "forward", **kwargs: Any) -> Any:
        """Call a method of the torch module; the state is updated."""

    @property
    @abstractmethod
    def weights(self) -> Weights: ...

    @property
    @abstractmethod
    def skeleton(self) -> torch.nn.Module:
        """The torch module in the static part."""

    @abstractmethod
    def replaced(self, leaves: Leaves) -> "Model":
        """A model with other values of some leaves."""

    @abstractmethod
    def in_mode(self, *, training: bool) -> "Model": ...

    @abstractmethod
    def jit(self, program: Program) -> Callable[..., Any]:
        """`program(self, ...)`, compiled."""

    @abstractmethod
    def gradients(self, loss: Program, *inputs: Any) -> Gradients:
        """Of `loss(self, *inputs) -> (value, aux)`, with respect to all inexact weights and inputs."""

    @abstractmethod
    def vmap(self, program: Program) -> Callable[..., Any]:
        """`program(self, ...)` for each row of the inputs; the state stays as it is."""

    @classmethod
    @abstractmethod
    def stack(cls, models: Sequence[Any]) -> "Model":
        """An ensemble."""

    @abstractmethod
    def vmap_members(self, program: Program, in_axes: int | None = None) -> Callable[..., Any]:
        """`program(member, ...)` for each member of an ensemble; `in_axes` are those of all inputs."""

    @abstractmethod
    def trainer(self, optimizer: optax.GradientTransformation, loss: Program) -> Callable[..., jax.Array]:
        """A compiled step of the recipe in the documentation: it updates the model and gives `loss(self, ...)`."""

    @abstractmethod
    def _held(self) -> tuple[Any, ...]:
        """The arguments `model, state` of the functions below."""

    @abstractmethod
    def _loaded(self, loaded: Any) -> "Model":
        """A model from what `load_state_dict` gave."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return torchleaf.state_dict(*self._held())

    def load_state_dict(self, state_dict: Any, **options: Any) -> "Model":
        model, *state = self.replaced({})._held()  # NNX changes its model in place
        return self._loaded(torchleaf.load_state_dict(model, state_dict, *state, **options))

    def to_torch(self, **options: Any) -> torch.nn.Module:
        return torchleaf.to_torch_module(*self._held(), **options)

    def maybe_jit(self, program: Program, *, jit: bool) -> Callable[..., Any]:
        return self.jit(program) if jit else functools.partial(program, self)

    def _with(self, **changes: Any) -> Any:
        new = copy.copy(self)
        vars(new).update(changes)
        return new


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Static:
    """A leaf for transformations that take arrays only."""

    value: Any


def hide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x if eqx.is_array(x) else _Static(x), tree)


def show(tree: Any) -> Any:
    def is_static(x: Any) -> bool:
        return isinstance(x, _Static)

    return jax.tree.map(lambda x: x.value if is_static(x) else x, tree, is_leaf=is_static)


def present(leaves: dict[str, Any]) -> Leaves:
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}
