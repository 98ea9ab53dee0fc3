"""`JaxModule`: an Equinox, Linen or NNX module, or a function with parameters, as a `torch.nn.Module`."""

import sys
from typing import Any

import equinox as eqx
import jax
import torch
from torch import nn

from ...interop.jax_function import JaxFunction
from ...interop.values.arrays import array_to_torch, tensor_to_jax
from ..equinox_tools import trainable
from .equinox import EquinoxKind
from .kinds import FunctionKind, Kind


class JaxModule(nn.Module):
    """A JAX model as a torch module: torch's parameters, optimizers and checkpoints, JAX's arithmetic.

    ```python
    model = torchleaf.JaxModule(eqx.nn.Linear(3, 2, key=jax.random.key(0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    ```

    Its trainable floating and complex arrays are parameters, all others buffers, by the path that each has in the
    model, as torch writes names: `layers.0.weight`. An array that the model holds in several places is one parameter
    with several names. All are copies: the model that is given never changes.

    `train()` and `eval()` set Equinox's inference mode, `deterministic` and `use_running_average` of Flax, and `train`
    or `training` of modules that ask for it. State (`eqx.nn.State`, `batch_stats`, `nnx.BatchStat`) is in buffers,
    updated in place by each call in which the model changes it. Random numbers follow `torch.manual_seed`: a call draws
    a key if the model makes use of one, from `key`, a `torch.Generator` or JAX key that it is called with, or from
    torch's default generator.

    **Arguments:**

    - `model`: an Equinox module, a Linen module, an NNX module, or a function whose first argument is `variables`.
    - `variables`: the `eqx.nn.State` of an Equinox module, what `module.init` of a Linen module returned, or the
      function's pytree of parameters.
    - `axis_name`: for an Equinox module, which takes one example: call it for each example of batches that lead every
      tensor, with the axis of that name, as `eqx.nn.BatchNorm` needs it.

    **Raises:** `TypeError` for a model of no known kind, or without its variables.

    Source: [`torch.nn.Module`](https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html).
    """

    def __init__(self, model: Any, variables: Any = None, *, axis_name: str | None = None):
        super().__init__()
        kind = _kind(model, variables, axis_name)
        self._jax = _Jax(kind)
        self._weights: list[tuple[str, nn.Module, str, bool]] = []
        """Each array's name, and where it is, in which module by which name; whether a call may change it."""
        tensors = {name: array_to_torch(x, copy=True) for name, x in kind.arrays.items()}
        made = {name: nn.Parameter(x) if name in kind.trainable else x for name, x in tensors.items()}
        for name in (*made, *kind.aliases):
            module, attribute = self._place(name)
            tensor = made[kind.aliases.get(name, name)]
            home: dict[str, Any] = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
            home[attribute] = tensor
            if name in made:
                self._weights.append((name, module, attribute, name in kind.stateful))
        kind.forget()

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module, made if there is none, in which an array is."""
        *path, attribute = name.split(".")
        module: nn.Module = self
        for part in path:
            module = module._modules.setdefault(part, _Part()) or self
        return module, attribute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, of tensors where the model takes arrays.

        **Arguments:** those of the model, and `key`, a `torch.Generator` or a JAX PRNG key, for its random numbers.

        **Returns:** what the model returns, a `torch.Tensor` for each array, without its state.
        """
        key = {"key": kwargs.pop("key")} if "key" in kwargs else {}
        keeps = torch.is_grad_enabled()  # backward may need the state as it was
        weights = {}
        for name, module, attribute, is_state in self._weights:
            tensor = _tensor(module, attribute)
            weights[name] = tensor.clone() if is_state and keeps else tensor
        out, updates = self._jax.function(weights, args, kwargs, training=self.training, **key)
        with torch.no_grad():
            for name, module, attribute, _ in self._weights if updates else ():
                if name in updates:
                    _tensor(module, attribute).copy_(updates[name])
        return out

    def extra_repr(self) -> str:
        return self._jax.kind.name


class _Jax:
    """The JAX side of a module. It never changes, and whoever looks through a module's attributes stops here."""

    __slots__ = ("function", "kind")

    def __init__(self, kind: Kind):
        self.kind, self.function = kind, _function(kind)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Jax":
        return self

    def __reduce__(self) -> Any:
        return _Jax, (self.kind,)


def to_jax_model(module: Any) -> Any:
    """The JAX model of a `JaxModule`, with the weights and the state that it has today.

    **Arguments:** `module`: a `JaxModule`.

    **Returns:** what `JaxModule` was made of, a new one: the Equinox module, or `(module, state)`; the Linen
    `(module, variables)`; the NNX module; `(function, parameters)`. Its arrays are copies, which torch never changes.

    **Raises:** `TypeError` for any other module.
    """
    if not isinstance(module, JaxModule):
        raise TypeError(f"to_jax_model: module is a {type(module).__qualname__}; give a `torchleaf.JaxModule`.")
    arrays = {
        name: tensor_to_jax(_tensor(part, attribute).detach(), copy=True, name=name)
        for name, part, attribute, _ in module._weights
    }
    return module._jax.kind.model(arrays)


class _Part(nn.Module):
    """A part of the model, that its arrays have their names."""


def _tensor(module: nn.Module, attribute: str) -> torch.Tensor:
    for tensors in (module._parameters, module._buffers):
        if attribute in tensors:
            return tensors[attribute]  # pyright: ignore[reportReturnType]
    return getattr(module, attribute)  # parametrizations


def _kind(model: Any, variables: Any, axis_name: str | None) -> Kind:
    given: Any = model
    if isinstance(model, eqx.Module) and (variables is None or isinstance(variables, eqx.nn.State)):
        return EquinoxKind(model, variables, axis_name)
    if axis_name is not None:
        raise TypeError("JaxModule: axis_name is for Equinox modules; Flax modules take batches themselves.")
    linen: Any
    nnx: Any
    linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
    if linen is not None and isinstance(model, linen.Module):
        if variables is None:
            raise TypeError(
                f"JaxModule: model is the Linen module {type(model).__qualname__}, which has no weights. Give them as "
                "well: `JaxModule(module, module.init(key, x))`."
            )
        from .linen import LinenKind

        return LinenKind(given, variables)
    if nnx is not None and isinstance(model, nnx.Module):
        from .nnx import NNXKind

        return NNXKind(given)
    if callable(model) and variables is not None:
        return FunctionKind(model, variables, trainable(variables))
    raise TypeError(
        f"JaxModule: model is a {type(model).__qualname__} without parameters of its own. Give an "
        "Equinox, Linen or NNX module, or a function together with the pytree of parameters that it takes first."
    )


def _function(kind: Kind) -> JaxFunction:
    def call(
        weights: dict[str, jax.Array], args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, key: Any
    ) -> Any:
        return kind.call(weights, args, kwargs, training=training, key=key)

    call.__qualname__ = kind.name
    return JaxFunction(call)
