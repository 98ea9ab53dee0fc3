"""`TorchModule`: a torch module as a Flax NNX module."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from jaxtyping import Array

from ..interop.errors import TorchCallError
from ..interop.modes.random import DeferredKey
from ..interop.types import CallOptions, Engine, Residuals, VmapMethod
from .flax_collections import collections, stop_gradient
from .module.cache import cached
from .module.functional_module import FunctionalModule
from .module.skeleton import named_tensors
from .module.weights import Held, held

_KEY_REMEDY = (
    "Make TorchModule with `rngs=nnx.Rngs(...)` that has a `dropout` or a default stream, or pass `rngs=` to the call"
)


class Frozen(nnx.Variable[Array]):
    """A torch parameter with `requires_grad=False`; no gradient flows to it."""


class Buffer(nnx.Variable[Array]):
    """A torch buffer that is no batch statistic; no gradient flows to it."""


for _name, _type in (("frozen", Frozen), ("buffers", Buffer)):  # the collections that nnx.bridge.ToLinen puts them in
    with contextlib.suppress(ValueError):  # nnx.bridge.ToNNX has met the name before, and made a type of its own
        nnx.register_variable_name(_name, _type)

_VARIABLES: dict[str, type[nnx.Variable]] = {
    "params": nnx.Param,
    "batch_stats": nnx.BatchStat,
    "frozen": Frozen,
    "buffers": Buffer,
}
_CONSTANTS = (nnx.BatchStat, Frozen, Buffer)


class Submodule(nnx.Module):
    """The weights of one torch submodule, and its own submodules that have any, as attributes of torch's names.

    Names that are no Python identifiers are reached by index: `model.layers[0]`, `model.blocks["conv-1"]`.
    """

    def __getitem__(self, name: str | int) -> Any:
        try:
            return vars(self)[_attribute(str(name))]
        except KeyError:
            names = [n for n, x in vars(self).items() if isinstance(x, Submodule | nnx.Variable)]
            raise KeyError(f"{name!r}; there are {names}.") from None

    __iter__ = None  # weights and submodules have no common use


class TorchModule(Submodule):
    """A `torch.nn.Module` as an NNX module, whose Variables hold torch's parameters viewed as JAX arrays.

    ```python
    from flax import nnx

    model = torchleaf.nnx.TorchModule(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout()), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss
    ```

    Attributes mirror the torch module: torch's `encoder.layers.0.weight` is `model.encoder.layers[0].weight`, and its
    path in `nnx.state(model)` is `("encoder", "layers", "0", "weight")`. A name that means something to NNX (`rngs`,
    `sow`, ...) gets an underscore at its end. Tied weights are one Variable, a submodule in two places is one
    `Submodule`.

    | Variable | holds |
    |---|---|
    | `nnx.Param` | parameters with `requires_grad` |
    | `torchleaf.nnx.Frozen` | those without; no gradient flows to them |
    | `nnx.BatchStat` | running statistics; the forward updates them in place |
    | `torchleaf.nnx.Buffer` | other buffers; likewise |

    **Attributes:**

    - `deterministic`: whether the module runs in torch's evaluation mode; at first as the torch module is.
      `model.train()`, `model.eval()` and `nnx.view(model, deterministic=...)` set it.
    - `rngs`: the stream of keys that random ops draw from, or None.
    """

    deterministic: bool
    rngs: nnx.RngStream | None

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        vmap_method: VmapMethod = "auto",
        residuals: Residuals = "live",
        forward_mode: bool = True,
        replay: bool = True,
        out_shape: Any = None,
        engine: Engine = "torch",
        strict: bool = False,
        copy: bool = False,
        channels_last: bool = False,
    ):
        """**Arguments:**

        - `module`: any initialised `torch.nn.Module`. It is not changed; its weights are shared with the Variables
          (same memory, through DLPack) until an update replaces their values, so in-place torch operations on
          `module` show through.
        - `rngs`: where random ops draw from, as in `nnx.Dropout`: a fork of its `dropout` stream (or its default one)
          is kept. Needed by modules that draw, in calls that are given none.
        - `vmap_method`, `residuals`, `forward_mode`, `replay`, `out_shape`, `engine`,
          `strict`: as in `torchleaf.torch_function`.
        - `copy`: copy the weights instead.
        - `channels_last`: images come and go as Flax has them, with channels in the last axis: in every floating array
          of three axes or more, the last axis is torch's second one.

        **Raises:** `TypeError` for lazy modules, those that cannot be copied, and weights that JAX cannot have.
        """
        options = CallOptions(vmap_method, residuals, forward_mode, replay, out_shape, engine=engine, strict=strict)
        own: dict[str, Any] = {"remedy": "", "key_remedy": _KEY_REMEDY, "channels_last": channels_last}
        self._torch = cached(
            module,
            ("nnx", options.key, channels_last),
            lambda: _Torch(FunctionalModule(module, options=options, **own)),
        )
        self.deterministic = not module.training
        stream = _stream(rngs)
        self.rngs = nnx.data(None if stream is None else stream.fork())
        groups, kinds = self._torch.module.leaves(module, copy=copy), collections(self._torch.module)
        leaves = {name: leaf for group in groups.values() for name, leaf in group.items()}
        _fill(self, module, {name: _VARIABLES[kinds[name]](leaf) for name, leaf in leaves.items()})

    def __call__(self, *args: Any, rngs: Any = None, deterministic: bool | None = None, **kwargs: Any) -> Any:
        """Run `forward`; buffers that it changes are updated in place.

        **Arguments:**

        - those of the torch module's `forward`: pytrees with `jax.Array` leaves for tensors, and static values;
        - `rngs`: where random ops draw from, instead of the stream given when the module was made: an `nnx.Rngs`, an
          `nnx.RngStream` or a key;
        - `deterministic`: torch's evaluation mode for this call, instead of the attribute.

        A `forward` that has a parameter named `rngs` or `deterministic` itself gets what is given.

        **Returns:** what `forward` returns, with `jax.Array`s for tensors.

        **Raises:** `torchleaf.RandomnessError` if it draws random numbers and there are no `rngs`,
        `torchleaf.TorchCallError` with torch's message if it fails.
        """
        return _run(self, "forward", args, kwargs, {"rngs": rngs, "deterministic": deterministic})

    def call(
        self, method: str, /, *args: Any, rngs: Any = None, deterministic: bool | None = None, **kwargs: Any
    ) -> Any:
        """Run another method of the torch module, e.g. `model.call("encode", x)`, as `__call__` runs `forward`."""
        return _run(self, method, args, kwargs, {"rngs": rngs, "deterministic": deterministic})

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          deterministic: if True, torch's evaluation mode.
        """
        if deterministic is not None:
            self.deterministic = deterministic


class _Torch:
    """The static part of a `TorchModule`: the code, and where each weight is. Copies of a model share it."""

    def __init__(self, module: FunctionalModule):
        self.module = module
        self._paths = {name: tuple(map(_attribute, name.split("."))) for name in module.specs}

    def __repr__(self) -> str:
        return repr(self.module)

    def __deepcopy__(self, memo: Any) -> "_Torch":
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Torch) and self.module == other.module

    def __hash__(self) -> int:
        return hash(self.module)

    def variables(self, model: TorchModule) -> dict[str, nnx.Variable]:
        """The Variables of a model, by torch name."""
        found = {}
        for name, path in self._paths.items():
            node: Any = model
            try:
                for attribute in path:
                    node = vars(node)[attribute]
            except KeyError:
                raise TypeError(
                    f"{self.module.name}: Variable {name!r} is missing from the model. If it was popped or split, put "
                    "it back before the call: `nnx.update(model, state)` or `nnx.merge(graphdef, *states)`."
                ) from None
            found[name] = node
        return found


def _run(model: TorchModule, method: str, args: Any, kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
    """Call a method, and update the buffers that it changes."""
    functional, variables = model._torch.module, model._torch.variables(model)
    for name in options.keys() & functional.arguments(method):  # torch's own argument
        kwargs |= {} if options[name] is None else {name: options[name]}
        options = {**options, name: None}
    rngs, deterministic = options["rngs"], options["deterministic"]
    inference = model.deterministic if deterministic is None else deterministic
    function = functional.function(method, bool(inference))
    weights = {name: _weight(name, v, functional.specs[name].shape) for name, v in variables.items()}
    key = _key(model.rngs if rngs is None else rngs)
    output, changed = function.call(weights, args, kwargs, key=key, stateful=True)
    for name, value in changed.items():
        variables[name].set_value(value)
    return output


def _fill(root: TorchModule, module: torch.nn.Module, variables: dict[str, nnx.Variable]) -> None:
    """Give a model its Variables, and Submodules between; what torch has in two places is one object here, too."""
    variable_of = {id(tensor): variables[name] for name, tensor in named_tensors(module)}
    node_of: dict[int, Submodule] = {id(module): root}

    def fill(node: Submodule, part: torch.nn.Module) -> None:
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                setattr(node, _attribute(name), variable_of[id(tensor)])
        for name, child in part._modules.items():
            if child is None or not named_tensors(child):
                continue
            if id(child) not in node_of:
                node_of[id(child)] = Submodule()
                fill(node_of[id(child)], child)
            setattr(node, _attribute(name), node_of[id(child)])

    fill(root, module)


_OWN = frozenset({*dir(TorchModule), "deterministic", "rngs", "use_running_average", "_torch"})
"""Attributes that mean something to NNX, or to `TorchModule`."""


def _attribute(name: str) -> str:
    """The attribute for a torch name: the same, unless it means something else."""
    return f"{name}_" if name.rstrip("_") in _OWN else name


def _stream(rngs: Any) -> nnx.RngStream | None:
    """The stream for random ops, as `nnx.Dropout` chooses it; None if there is none for them."""
    if isinstance(rngs, nnx.Rngs):
        return rngs["dropout"] if "dropout" in rngs or "default" in rngs else None
    if rngs is None or isinstance(rngs, nnx.RngStream):
        return rngs
    raise TypeError(f"rngs must be an nnx.Rngs, an nnx.RngStream or None, got {type(rngs).__name__}.")


def _key(rngs: Any) -> Any:
    """A key for one call; a stream makes it only if the call draws."""
    if isinstance(rngs, jax.Array):
        return rngs
    stream = _stream(rngs)
    return None if stream is None else DeferredKey(stream.key[...], stream)


def _weight(name: str, variable: nnx.Variable, shape: tuple[int, ...]) -> Array:
    """The value that torch computes with."""
    value = variable.get_value()
    if value.shape != shape:
        raise TorchCallError(
            f"Variable {name!r} has shape {value.shape}, but the torch module's is {shape}. A model whose "
            "Variables are stacked is called under nnx.vmap or nnx.scan: "
            "`nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(model, x)`."
        )
    return stop_gradient(value) if isinstance(variable, _CONSTANTS) else value


@held.register
def _(model: TorchModule, state: Any) -> Held:
    if state is not None:
        raise TypeError("state: an NNX model holds its state itself; leave the argument out.")
    variables = model._torch.variables(model)

    def replace(weights: dict[str, Array], module: FunctionalModule) -> TorchModule:
        for name, variable in variables.items():
            variable.set_value(weights[name])
        if module is not model._torch.module:
            model._torch = _Torch(module)
        return model

    weights = {name: jnp.asarray(v.get_value()) for name, v in variables.items()}  # msgpack restores NumPy arrays
    return Held(model._torch.module, weights, training=not model.deterministic, replace=replace)
