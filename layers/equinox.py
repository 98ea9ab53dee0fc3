"""`TorchModule`: a torch module as an Equinox module."""

from typing import Any

import equinox as eqx
import jax
import torch
from jax.core import Tracer
from jaxtyping import Array

from ..interop.errors import StateError
from ..interop.sharding.manual import varying
from ..interop.types import CallOptions, Engine, Residuals, VmapMethod
from .module.fingerprint import Same
from .module.functional_module import FunctionalModule
from .module.weights import Held, held

_REMEDY = (
    "Make the model with `model, state = eqx.nn.make_with_state(...)(...)` and call it with `state=state`, which gives "
    "`(output, state)`; or use evaluation mode (`eqx.nn.inference_mode(model)`, or `module.eval()` before wrapping), "
    "in which layers like BatchNorm do not update."
)


class _Mark:
    """Equals every other: what it marks does not make two models different."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mark)

    def __hash__(self) -> int:
        return 0


class _Unbound(eqx.nn.StateIndex):
    """Holds the buffers of a model that `make_with_state` has not seen, which puts a plain `StateIndex` in its place.

    A plain one has a mark of its own until then, so that no two networks would be of one structure. This one's is, as
    part of the structure, like every other; a `State` that asks for it gets one that equals itself alone.
    """

    def __init__(self, init: dict[str, Array]):
        self.marker, self.init = _Mark(), init

    @property
    def marker(self) -> Same:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Same(vars(self)["marker"])

    @marker.setter
    def marker(self, value: Any) -> None:
        vars(self)["marker"] = value


def _key(index: eqx.nn.StateIndex[Any]) -> eqx.nn.StateIndex[Any]:
    """An index as a `State` takes it."""
    if not isinstance(index, _Unbound):
        return index
    plain = eqx.nn.StateIndex(None)
    object.__setattr__(plain, "marker", index.marker)
    return plain


class TorchModule(eqx.nn.StatefulLayer):
    """A `torch.nn.Module` as an Equinox module, whose leaves are torch's parameters viewed as JAX arrays.

    ```python
    encoder = torchleaf.TorchModule(torch.nn.Linear(3, 4))
    y = jax.vmap(encoder)(x)                      # x: f32[64, 3]
    grads = eqx.filter_grad(loss)(encoder, x, y)  # an encoder with gradients for leaves
    ```

    A module whose forward changes buffers (BatchNorm in training) keeps them as Equinox's stateful layers do, in an
    `eqx.nn.State`; one that draws random numbers (Dropout in training) is given a `key`:

    ```python
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout())
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module)
    y, state = model(x, state=state, key=jax.random.key(0))
    ```

    It is a pytree like every Equinox module: `eqx.filter_jit`, `filter_grad`, `filter_vmap`, `partition`, `tree_at`,
    `tree_serialise_leaves`, `eqx.nn.Sequential` and `eqx.nn.inference_mode` work on it and on models that hold it.
    `torchleaf.trainable` tells an optimizer which leaves to train.

    **Fields:**

    - `params`: torch parameter name to array, those with `requires_grad`;
    - `frozen`: likewise, those without; no gradient flows to them;
    - `buffers`: likewise, torch's buffers, until `eqx.nn.make_with_state` takes them into the state; no gradient flows
      to them;
    - `buffer_index`: where the state holds them: `state.get(model.buffer_index)`; None if there are none;
    - `inference`: whether the module runs in torch's evaluation mode.
    """

    params: dict[str, Array]
    frozen: dict[str, Array]
    buffer_index: eqx.nn.StateIndex[dict[str, Array]] | None
    inference: bool
    module: FunctionalModule = eqx.field(static=True, repr=False)

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        vmap_method: VmapMethod = "auto",
        residuals: Residuals = "live",
        forward_mode: bool = True,
        replay: bool = True,
        out_shape: Any = None,
        engine: Engine = "torch",
        strict: bool = False,
        copy: bool = False,
    ):
        """**Arguments:**

        - `module`: any initialised `torch.nn.Module`. It is not changed; its weights are shared with the leaves
          (same memory, through DLPack) until an update replaces the leaves, so in-place torch operations on
          `module` show through. Tied weights are one leaf.
        - `vmap_method`, `residuals`, `forward_mode`, `replay`, `out_shape`, `engine`,
          `strict`: as in `torchleaf.torch_function`.
        - `copy`: copy the weights instead.

        **Raises:** `TypeError` for lazy modules, those that cannot be copied, and weights that JAX cannot have.
        """
        options = CallOptions(vmap_method, residuals, forward_mode, replay, out_shape, engine=engine, strict=strict)
        self.module = FunctionalModule(module, remedy=_REMEDY, options=options)
        leaves = self.module.leaves(module, copy=copy)
        self.params, self.frozen = leaves["params"], leaves["frozen"]
        self.buffer_index = _Unbound(leaves["buffers"]) if leaves["buffers"] else None
        self.inference = not module.training

    @property
    def buffers(self) -> dict[str, Any]:
        """torch's buffers; `AttributeError` if an `eqx.nn.State` holds them."""
        if self.is_stateful():
            raise AttributeError(
                f"the buffers of this TorchModule ({self.module.name}) are in the eqx.nn.State that make_with_state "
                "returned: `state.get(model.buffer_index)`."
            )
        return {} if self.buffer_index is None else self.buffer_index.init  # pyright: ignore[reportReturnType]

    def is_stateful(self) -> bool:
        """Whether an `eqx.nn.State` holds the buffers, so that calls need it."""
        return self.buffer_index is not None and not isinstance(self.buffer_index.init, dict)

    def __call__(self, *args: Any, key: Any = None, state: Any = None, **kwargs: Any) -> Any:
        """Run `forward`.

        **Arguments:**

        - those of the torch module's `forward`: pytrees with `jax.Array` leaves for tensors, and static values;
        - `key`: a JAX PRNG key, typed or raw, for modules that draw random numbers: the same key, the same numbers;
        - `state`: the `eqx.nn.State`, by this name or as the last positional argument, if the model was made by
          `eqx.nn.make_with_state`.

        A `forward` that has a parameter named `key` or `state` itself gets what is no PRNG key or `eqx.nn.State`.

        **Returns:** what `forward` returns, with `jax.Array`s for tensors; with `state`, a tuple of that and the new
        state.

        **Raises:** `torchleaf.StateError` if the forward changes buffers and there is no state,
        `torchleaf.RandomnessError` if it draws random numbers and there is no key, `torchleaf.TorchCallError` with
        torch's message if it fails.
        """
        return self.call("forward", *args, key=key, state=state, **kwargs)

    def call(self, method: str, /, *args: Any, key: Any = None, state: Any = None, **kwargs: Any) -> Any:
        """Run another method of the torch module, e.g. `model.call("encode", x)`, as `__call__` runs `forward`."""
        if isinstance(self.inference, Tracer):
            raise TypeError(
                f"{self.module.name}: `inference` is traced; a flag that chooses code must be static. Use "
                "eqx.filter_jit (filter_grad, ...) instead of jax.jit, or eqx.partition the model by eqx.is_array; and "
                "eqx.filter_shard instead of jax.device_put, which makes arrays of flags."
            )
        if args and isinstance(args[-1], eqx.nn.State):
            args, state = args[:-1], args[-1]
        elif state is not None and not isinstance(state, eqx.nn.State):
            kwargs, state = {**kwargs, "state": state}, None
        buffers = self.buffers_in(state)
        constants = jax.tree.map(_stop_gradient, {**self.frozen, **buffers})
        function = self.module.function(method, bool(self.inference))
        weights = {**self.params, **constants}
        output, changed = function.call(weights, args, kwargs, key=key, stateful=state is not None)
        if state is None:
            return output
        return output, self.with_buffers(state, changed)

    def buffers_in(self, state: eqx.nn.State | None) -> dict[str, Any]:
        """torch's buffers, from where they are: the state, or else the model.

        **Raises:** `torchleaf.StateError` if the state is missing, or is not of this model.
        """
        if state is None and self.is_stateful():
            raise StateError(
                f"{self.module.name}: the buffers are in the eqx.nn.State that make_with_state returned. Pass it: "
                "`output, state = model(x, state=state)`."
            )
        if state is None or self.buffer_index is None:
            return self.buffers
        try:
            buffers = state.get(_key(self.buffer_index))
        except KeyError:
            buffers = {}
        if not self.module.fits("buffers", buffers):
            raise StateError(
                f"{self.module.name}: `state` holds no buffers of this model. Make both together: "
                "`model, state = eqx.nn.make_with_state(...)(...)`."
            )
        return buffers

    def with_buffers(self, state: eqx.nn.State, changed: dict[str, Any]) -> eqx.nn.State:
        """A state in which some of torch's buffers, by name, have new values."""
        if self.buffer_index is None or not changed:
            return state
        index = _key(self.buffer_index)
        old = state.get(index)
        self._refuse_to_mix(old, changed)
        return state.set(index, {**old, **changed})

    def _refuse_to_mix(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Within `jax.shard_map` each device's values are its own, which Equinox takes for another structure."""
        for name, value in new.items():
            more = varying(jax.typeof(value)) - varying(jax.typeof(old[name]))
            if more:
                axes = tuple(sorted(more))
                raise StateError(
                    f"{self.module.name}: buffer `{name}` has a value of each device's own after the call (over the "
                    f"mesh axes {axes} of jax.shard_map), but the state is one that they share. Give each its own, "
                    f"`jax.tree.map(lambda b: jax.lax.pcast(b, {axes}, to='varying'), state)`, and after the call say "
                    f"what they come to, for instance `jax.lax.pmean(b, {axes})`."
                )


@held.register
def _(model: TorchModule, state: eqx.nn.State | None) -> Held:
    buffers = model.buffers_in(state)

    def replace(weights: dict[str, Array], module: FunctionalModule) -> Any:
        params, frozen, new_buffers = ({k: weights[k] for k in old} for old in (model.params, model.frozen, buffers))
        new = eqx.tree_at(lambda m: (m.params, m.frozen), model, (params, frozen))
        object.__setattr__(new, "module", module)
        if state is not None:
            return new, new.with_buffers(state, new_buffers)
        return eqx.tree_at(lambda m: m.buffers, new, new_buffers)

    weights = {**model.params, **model.frozen, **buffers}
    return Held(model.module, weights, training=not model.inference, replace=replace)


def _stop_gradient(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if isinstance(x, Tracer) else x
