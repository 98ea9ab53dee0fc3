"""`TorchModule`: a torch module as a Flax Linen module."""

import functools
import types
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import torch
from flax import errors
from flax.core import FrozenDict, Scope, freeze, meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer

from ..interop.errors import StateError
from ..interop.modes.random import DeferredKey
from ..interop.types import CallOptions, Engine, Residuals, VmapMethod
from .flax_collections import Collection, nest, stop_gradient
from .linen_captured import Captured, Tree
from .module.functional_module import FunctionalModule
from .module.reinitialize import reinitialize
from .module.weights import Held, held


class TorchModule(nn.Module):
    """A `torch.nn.Module` as a Flax Linen module.

    ```python
    encoder = torchleaf.linen.TorchModule(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)))
    variables = encoder.init(jax.random.key(0), x, train=False)  # torch's weights, as views
    y, updates = encoder.apply(variables, x, train=True, mutable=["batch_stats"])
    ```

    Its variables are nested by torch's dotted names, `variables["params"]["0"]["weight"]`, in these collections:
    `params` (parameters with `requires_grad`), `frozen` (those without), `batch_stats` (running statistics) and
    `buffers` (other buffers). No gradient flows to the last three. Random numbers (Dropout in training) are drawn from
    the stream `dropout`: `apply(..., rngs={"dropout": key})`.

    It is a submodule like any other, in `setup` and under `@nn.compact`, and goes through Linen's transformations.
    torch's other methods are its methods too: `encoder.apply(variables, x, method="encode")`.

    **Fields:**

    - `module`: any initialised `torch.nn.Module`. It is not changed; what it is when it is wrapped counts, and its
      weights when `init` runs. They share memory with the variables (through DLPack) until an update replaces those.
    - `train`, `deterministic`: torch's training mode, or its opposite, in the words of other Flax modules; here or in
      each call. With neither, the mode in which `module` was wrapped.
    - `initializer`: what `init` puts into `params` instead of torch's weights: a JAX initialiser
      `(key, shape, dtype) -> array` for all of them; a dict of such, by torch name or pattern (`{"*.weight": ...}`),
      the first that fits counting and the others keeping torch's weights; or `"reset_parameters"`, by which torch's
      layers initialise themselves anew, statistics included, from the stream `params`.
    - `channels_last`: floating arrays of three axes or more have their channels in the last axis, as Flax's layers
      want them, both arguments and results; torch sees them in the second, by a view.
    - `copy_weights`: `init` copies torch's weights. (`copy` is a method of every Linen module.)
    - `rng_collection`: the stream of random numbers, as in `nn.Dropout`.
    - `vmap_method`, `residuals`, `forward_mode`, `replay`, `out_shape`, `engine`, `strict`: as in
      `torchleaf.torch_function`.

    **Raises:** `TypeError` for lazy modules, those that cannot be copied, and weights that JAX cannot have.
    """

    module: torch.nn.Module
    train: bool | None = None
    deterministic: bool | None = None
    initializer: Any = None
    channels_last: bool = False
    copy_weights: bool = False
    rng_collection: str = "dropout"
    vmap_method: VmapMethod = "auto"
    residuals: Residuals = "live"
    forward_mode: bool = True
    replay: bool = True
    out_shape: Any = None
    engine: Engine = "torch"
    strict: bool = False
    made: Any = field(default=None, repr=False)  # carried over to Linen's clones; not to be given

    def __post_init__(self) -> None:
        if isinstance(self.initializer, Mapping):  # as pairs, whose order Flax keeps
            self.initializer = tuple(self.initializer.items())
        if self.out_shape is not None and not isinstance(self.out_shape, Tree):
            self.out_shape = Tree(*jax.tree.flatten(self.out_shape))
        out_shape = None if self.out_shape is None else self.out_shape.tree
        options = CallOptions(
            self.vmap_method,
            self.residuals,
            self.forward_mode,
            self.replay,
            out_shape,
            engine=self.engine,
            strict=self.strict,
        )
        own = (options.key, self.channels_last, self.rng_collection)
        if self.made is None or (self.made.source, self.made.key) != (self.module, own):
            self.made = Captured.of(self.module, options, self.channels_last, self.rng_collection)
        super().__post_init__()

    def setup(self) -> None:
        initial = functools.cache(self._initial)
        for col, names in self.made.by_collection().items():
            for top in nest(names):  # a variable for each part at the top, in which the rest nests
                self._bound().variable(col, top, lambda col, top: initial()[col][top], col, top)

    def __call__(self, *args: Any, train: bool | None = None, deterministic: bool | None = None, **kwargs: Any) -> Any:
        """Run `forward`.

        **Arguments:**

        - those of the torch module's `forward`: pytrees with `jax.Array` leaves for tensors, and static values;
        - `train`, `deterministic`: as the fields. A `forward` that has a parameter of this name gets it instead, and
          the field decides on torch's mode.

        **Returns:** what `forward` returns, with `jax.Array`s for tensors. Buffers that it changes are updated in their
        collection, except in `init`.

        **Raises:** `torchleaf.StateError` if the collection of a changed buffer is not mutable,
        `torchleaf.RandomnessError` if random numbers are drawn and there is no stream to draw from,
        `torchleaf.TorchCallError` with torch's message if it fails.
        """
        return self._run("forward", args, kwargs, {"train": train, "deterministic": deterministic})

    def call(
        self, method: str, /, *args: Any, train: bool | None = None, deterministic: bool | None = None, **kwargs: Any
    ) -> Any:
        """Run another method of the torch module, as `__call__` runs `forward`."""
        return self._run(method, args, kwargs, {"train": train, "deterministic": deterministic})

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        """torch's other methods, so that `apply(..., method="encode")` and `self.encoder.encode(x)` find them."""
        made = vars(self).get("made")
        if made is None or name.startswith("_") or not made.has_method(name):
            return super().__getattr__(name)
        return types.MethodType(_method_named(name), self)

    @nn.nowrap
    def _run(self, method: str, args: Any, kwargs: dict[str, Any], flags: dict[str, Any]) -> Any:
        self._bound()
        made = self.made
        for name in flags.keys() & made.module.arguments(method):  # torch's own argument
            kwargs |= {} if flags[name] is None else {name: flags[name]}
            flags = {**flags, name: None}
        function = made.module.function(method, not self._training(**flags))
        weights, key = {name: self._weight(name) for name in made.collections}, self._key()
        if self.is_initializing():
            weights = _of_one_member(weights, made.module, (args, kwargs, key and key.like))
        mutable = any(self.is_mutable_collection(col) for col in made.state_collections())
        output, changed = function.call(weights, args, kwargs, key=key, stateful=mutable)
        if not self.is_initializing():
            self._update(changed)
        return output

    @nn.nowrap
    def _training(self, train: Any = None, deterministic: Any = None) -> bool:
        """Whether torch's training mode is on, with these arguments of a call."""
        training, name_of_module = set(), self.made.module.name
        for name, given in (("train", (self.train, train)), ("deterministic", (self.deterministic, deterministic))):
            if given != (None, None):
                flag = nn.merge_param(name, *given)
                if isinstance(flag, Tracer):
                    raise TypeError(
                        f"{name_of_module}: `{name}` is traced; a flag that chooses code must be static. Give it to "
                        f"the constructor, `TorchModule(module, {name}=...)`, or fix it outside of the transformation, "
                        f"e.g. by functools.partial."
                    )
                training.add(bool(flag) == (name == "train"))
        if len(training) > 1:
            raise ValueError(f"{name_of_module}: `train` and `deterministic` contradict each other; give one of them.")
        return training.pop() if training else self.made.module.training

    @nn.nowrap
    def _bound(self) -> Scope:
        if self.scope is None:
            raise errors.CallCompactUnboundModuleError
        return self.scope

    @nn.nowrap
    def _key(self) -> DeferredKey | None:
        """The next key of the stream, made if it is needed; as everywhere in Linen, `params` stands in for it."""
        streams = dict[str, Any](self._bound().rngs)
        stream = streams.get(self.rng_collection, streams.get("params"))
        return None if stream is None else DeferredKey(stream.rng, lambda: self.make_rng(self.rng_collection))

    @nn.nowrap
    def _stored(self, name: str) -> Any:
        """A variable by torch name, in the box that it may be in."""
        col, (top, *path) = self.made.collections[name], name.split(".")
        value = self._bound().get_variable(col, top)
        for part in path:
            if not isinstance(value, Mapping) or part not in value:
                raise errors.ScopeVariableNotFoundError(name, col, self._bound().path_text)
            value = value[part]
        return value

    @nn.nowrap
    def _weight(self, name: str) -> Any:
        value, shape = meta.unbox(self._stored(name)), self.made.module.specs[name].shape
        if value.shape != shape:
            raise errors.ScopeParamShapeError(name, self._bound().path_text, value.shape, shape)
        return value if self.made.collections[name] == "params" else stop_gradient(value)

    @nn.nowrap
    def _update(self, changed: dict[str, Any]) -> None:
        where = self.made.collections
        names = sorted(name for name in changed if not self.is_mutable_collection(where[name]))
        if names:
            raise StateError(
                f"{self.made.module.name} changes buffer `{names[0]}` in its forward pass, but the collection "
                f"{where[names[0]]!r} is not mutable. {self.made.module.remedy}"
            )
        for name, value in changed.items():
            for top, nested in nest({name: meta.replace_boxed(self._stored(name), value)}).items():
                self._bound().put_variable(where[name], top, nested)

    @nn.nowrap
    def _initial(self) -> dict[Collection, dict[str, Any]]:
        """What `init` puts into the collections."""
        leaves = self.made.module.leaves(self.module, copy=self.copy_weights)
        values = {**leaves["params"], **leaves["frozen"], **leaves["buffers"]}
        if self.initializer is not None:
            values |= reinitialize(self.made.module, self.initializer, values, self.make_rng)
        return {col: nest({name: values[name] for name in names}) for col, names in self.made.by_collection().items()}


def _of_one_member(weights: dict[str, Any], module: FunctionalModule, given: Any) -> dict[str, Any]:
    """The weights, with buffers that differ between the members of an ensemble, for all that `jax.vmap` can tell.

    What `init` makes is the same for all of them until it leaves `nn.vmap`, and buffers that are shared cannot change.
    """
    traced = [x for x in jax.tree.leaves(given) if isinstance(x, Tracer)]
    if not traced:
        return weights
    arrays = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in traced]
    zero = sum(jnp.sum(jnp.ravel(x)[:0] != 0) for x in arrays)
    is_buffer = {name: spec.kind == "buffers" for name, spec in module.specs.items()}
    return {name: jnp.where(zero == 0, x, x) if is_buffer[name] else x for name, x in weights.items()}


@functools.cache
def _method_named(name: str) -> Any:
    def method(self: TorchModule, *args: Any, **kwargs: Any) -> Any:
        return self.call(name, *args, **kwargs)

    method.__name__ = method.__qualname__ = name
    return method


@held.register
def _(model: TorchModule, state: Mapping[str, Any] | None) -> Held:
    if state is None and model.scope is None:
        raise TypeError(
            f"{model.made.module.name}: a Linen module holds no weights. Pass its variables as well, "
            "`state_dict(model, variables)`, or a bound module, `model.bind(variables)`."
        )
    variables = model.variables if state is None else state
    flat, where = flatten_dict(variables, keep_empty_nodes=True), model.made.collections
    place = {name: (col, *name.split(".")) for name, col in where.items()}
    for path in place.values():
        if path not in flat:
            raise KeyError(
                f"{model.made.module.name}: the variables have no {'/'.join(path)}; they have the collections "
                f"{sorted(variables)}. Pass all that `init` gave, of this module: "
                "`{col: tree['encoder'] for col, tree in variables.items()}` if it is a submodule `encoder`."
            )

    def replace(weights: dict[str, jax.Array], module: FunctionalModule) -> Any:
        if module is not model.made.module:
            raise ValueError(
                f"load_state_dict: the state dict gives {module.name} another extra state (`set_extra_state`), which "
                "is no variable of Linen's. Load it into the torch module, `module.load_state_dict(state_dict)`, and "
                "wrap that."
            )
        new = {place[name]: meta.replace_boxed(flat[place[name]], x) for name, x in weights.items()}
        nested = unflatten_dict({**flat, **new})
        return freeze(nested) if isinstance(variables, FrozenDict) else nested

    weights = {name: jnp.asarray(meta.unbox(flat[path])) for name, path in place.items()}  # NumPy's, from msgpack
    return Held(model.made.module, weights, training=model._training(), replace=replace)
