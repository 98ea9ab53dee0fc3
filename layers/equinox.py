"""`TorchModule`: a torch module as an Equinox module."""

from typing import Any

import equinox as eqx
import jax
import torch
from jax.core import Tracer
from jaxtyping import Array

from ..interop.call import Residuals, VmapMethod
from .functional_module import FunctionalModule


class TorchModule(eqx.Module):
    """A `torch.nn.Module` as an Equinox module, whose leaves are torch's parameters viewed as JAX arrays.

    ```python
    encoder = torchleaf.TorchModule(torch.nn.Linear(3, 4))
    y = jax.vmap(encoder)(x)                      # x: f32[64, 3]
    grads = eqx.filter_grad(loss)(encoder, x, y)  # an encoder with gradients for leaves
    ```

    It is a pytree like every Equinox module: `eqx.filter_jit`, `filter_grad`, `filter_vmap`, `partition`, `tree_at`,
    `tree_serialise_leaves`, `eqx.nn.Sequential` and `eqx.nn.inference_mode` work on it and on models that hold it.
    `torchleaf.trainable` tells an optimizer which leaves to train.

    **Fields:**

    - `params`: torch parameter name to array, those with `requires_grad`;
    - `frozen`: likewise, those without; no gradient flows to them;
    - `buffers`: likewise, torch's buffers; no gradient flows to them;
    - `inference`: whether the module runs in torch's evaluation mode.
    """

    params: dict[str, Array]
    frozen: dict[str, Array]
    buffers: dict[str, Array]
    inference: bool
    module: FunctionalModule = eqx.field(static=True, repr=False)

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        vmap_method: VmapMethod = "auto",
        residuals: Residuals = "live",
        forward_mode: bool = True,
        out_shape: Any = None,
        copy: bool = False,
    ):
        """**Arguments:**

        - `module`: any initialised `torch.nn.Module`. It is not changed; its weights are shared with the leaves
          (same memory, through DLPack) until an update replaces the leaves, so in-place torch operations on
          `module` show through. Tied weights are one leaf.
        - `vmap_method`, `residuals`, `forward_mode`, `out_shape`: as in `torchleaf.torch_function`.
        - `copy`: copy the weights instead.

        **Raises:** `TypeError` for lazy, scripted and float64 (without x64) modules, and those that cannot be copied.
        """
        self.module = FunctionalModule(
            module, vmap_method=vmap_method, residuals=residuals, forward_mode=forward_mode, out_shape=out_shape
        )
        leaves = self.module.leaves(module, copy=copy)
        self.params, self.frozen, self.buffers = leaves["params"], leaves["frozen"], leaves["buffers"]
        self.inference = not module.training

    def __call__(self, *args: Any, key: Any = None, **kwargs: Any) -> Any:
        """Run `forward`.

        **Arguments:** those of the torch module's `forward`: pytrees with `jax.Array` leaves for tensors, and static
        values. `key` is accepted for compatibility with `eqx.nn.Sequential`; deterministic modules do not use it.

        **Returns:** what `forward` returns, with `jax.Array`s for tensors.

        **Raises:** `torchleaf.StateError` if the forward changes buffers, `torchleaf.RandomnessError` if it draws
        random numbers, `torchleaf.TorchCallError` with torch's message if it fails.
        """
        return self.call("forward", *args, key=key, **kwargs)

    def call(self, method: str, /, *args: Any, key: Any = None, **kwargs: Any) -> Any:
        """Run another method of the torch module, e.g. `model.call("encode", x)`, as `__call__` runs `forward`."""
        del key
        if isinstance(self.inference, Tracer):
            raise TypeError(
                f"{self.module.name}: `inference` is traced; a flag that chooses code must be static. Use "
                "eqx.filter_jit (filter_grad, ...) instead of jax.jit, or eqx.partition the model by eqx.is_array."
            )
        constants = jax.tree.map(_stop_gradient, {**self.frozen, **self.buffers})
        return self.module.function(method, bool(self.inference))({**self.params, **constants}, *args, **kwargs)


def _stop_gradient(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if isinstance(x, Tracer) else x
