"""The arguments of a JAX function that torch calls: which leaves are operands, and what each is called in errors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer

from ..values import dtypes
from ..values.arrays import array_to_torch, check_dense
from ..values.names import argument_names, signature_of
from ..values.statics import static_key
from ..values.trees import flatten_registering
from .settings import settings_here

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Arguments:
    """One call's arguments, taken apart: operands, which are tensors, and static leaves."""

    def __init__(self, name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._name, self._fn, self._given = name, fn, (args, kwargs)
        self.leaves, self.treedef = flatten_registering((args, kwargs))
        self.operands: list[torch.Tensor] = []
        entries: list[Any] = []
        self.places: list[int] = []
        """Which leaf each operand is."""
        self.shapes: list[tuple[int, ...]] = []
        self.key_impls: dict[int, str] = {}
        for i, leaf in enumerate(self.leaves):
            if not isinstance(leaf, torch.Tensor):
                if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
                    entries.append(self._static(i, leaf))
                    continue
                leaf = self._tensor(i, leaf)
            self.places.append(i)
            self.operands.append(leaf)
            # Sizes that are symbols to the compiler become numbers: JAX has a program for each shape.
            shape = leaf.shape if type(leaf) in _PLAIN else tuple(map(int, leaf.shape))
            self.shapes.append(shape)
            entries.append((leaf.dtype, shape, leaf.layout, leaf.device))
        self.key = (
            self.treedef,
            tuple(entries),
            tuple(self.key_impls.items()),
            settings_here(),
        )

    def _static(self, index: int, leaf: Any) -> Any:
        key = static_key(leaf)
        try:
            hash(key)
        except TypeError:
            raise TypeError(
                f"{self._name}: {self.leaf_name(index)} is a {type(leaf).__qualname__}: neither an array nor hashable, "
                "as static values must be. Register its class as a pytree, or close over it."
            ) from None
        return key

    def _tensor(self, index: int, leaf: Any) -> torch.Tensor:
        """An operand that is JAX's or NumPy's already."""
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"{self._name}: {self.leaf_name(index)} is a traced JAX value ({jax.typeof(leaf)}), which torch cannot "
                "have. JAX code calls the function itself; torch code within JAX goes by `torchleaf.torch_function`."
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            self.key_impls[index] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        return array_to_torch(jnp.asarray(leaf), name=f"{self._name}: an argument")

    def leaf_name(self, index: int) -> str:
        """A leaf as the user wrote it: `x`, `targets['label']`."""
        return argument_names(signature_of(self._fn), *self._given)[index]

    def check(self) -> None:
        """`TypeError` or `ValueError` for a tensor that JAX has no array for, by its name."""
        for i, tensor in zip(self.places, self.operands, strict=True):
            self._check(i, tensor)
        devices = {x.device for x in self.operands}
        if len(devices) > 1:
            i, other = next((i, x) for i, x in enumerate(self.operands) if x.device != self.operands[0].device)
            raise ValueError(
                f"{self._name}: {self.leaf_name(self.places[0])} is on {self.operands[0].device}, but "
                f"{self.leaf_name(self.places[i])} on {other.device}. Move them to one device with `.to(device)`."
            )

    def _check(self, index: int, tensor: torch.Tensor) -> None:
        name = f"{self._name}: {self.leaf_name(index)}"
        check_dense(tensor, name, may_be_fake=True)  # to the compiler all are
        try:
            dtype = dtypes.to_jax_dtype(tensor.dtype)
        except TypeError as exc:
            raise TypeError(f"{name}: {exc}") from None
        if dtypes.is_inexact(dtype) and dtypes.canonical(tensor.dtype) != dtype:
            raise TypeError(
                f"{name} is {tensor.dtype}, but JAX has no 64-bit types here. Enable them with "
                f"`jax.config.update('jax_enable_x64', True)`, or convert it with "
                f"`.to({dtypes.to_torch_dtype(dtypes.canonical(tensor.dtype))})`."
            )
