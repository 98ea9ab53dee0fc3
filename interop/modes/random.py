"""Random numbers: a JAX key in, torch's random ops drawing from it and from nothing else.

A call that draws gets one more operand, the words of its key. While it runs, every random op draws from a generator of
the call's own, seeded by them; torch's global generators are neither read nor moved. So the numbers follow from the key
alone: the forward that is run again, eagerly, compiled or in another thread, draws the same.

Under `torch.func.vmap` an op draws for the whole batch; here it draws for each example from that example's own
generator, so that `vmap(f)(xs, keys)[i]` is `f(xs[i], keys[i])`, as for every JAX function.

Source: [JAX PRNG design](https://docs.jax.dev/en/latest/jep/9263-typed-keys.html),
[torch.Generator](https://docs.pytorch.org/docs/stable/generated/torch.Generator.html).
"""

import functools
import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ..errors import RandomnessError
from ..internals.fake import FakeTensor
from ..internals.ops import DisableTorchFunction
from ..internals.transforms import VMAP_TRANSFORM, batch_of, is_batched, transforms, unwrapped, without_transforms
from .aten import bound, in_checkpoint
from .device_random import DeviceDraws, can_draw
from .dispatch import Mode

_IN_PLACE = {"bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"}
_LIKE_AN_ARGUMENT = {"_standard_gamma", "bernoulli", "binomial", "native_dropout", "normal", "poisson"}
_OF_A_SIZE = {"rand", "rand_like", "randint", "randint_like", "randn", "randn_like"}
_EXAMPLE_BY_EXAMPLE = _IN_PLACE | _LIKE_AN_ARGUMENT | _OF_A_SIZE
"""Ops to which `torch.func.vmap` gives the batch as leading axes."""

_DROPOUT_RATES = dict.fromkeys(("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"), ("p",))
"""Where the rate is called `p`; elsewhere `p` is a probability, and numbers are drawn for zero, too."""

_KEY_SHAPES = ((2,), (4,))
"""Words of one key: threefry has two, rbg four."""

PASS_A_KEY = "Pass `key=` a JAX PRNG key (under vmap one for each example: jax.random.split(key, n))"


# --- the JAX side --------------------------------------------------------------------------------


def is_key(value: Any) -> bool:
    """Whether a value is a typed JAX PRNG key, or stands for one."""
    is_typed = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return is_typed or isinstance(value, DeferredKey)


@dataclass(frozen=True)
class DeferredKey:
    """A key that is made only if a call draws, so that a stream of keys does not move for nothing."""

    like: Any
    """A key of its type."""
    make: Callable[[], Any]


def key_operand(key: Any, name: str) -> jax.Array:
    """The words of one PRNG key, typed or raw: uint32[n].

    Raises `TypeError` for anything else.
    """
    if is_key(key):
        words = jax.random.key_data(key)
        shape = key.shape
    else:
        words, shape = key, getattr(key, "shape", (None,))[:-1]
    if getattr(words, "dtype", None) != jnp.uint32 or words.shape[-1:] not in _KEY_SHAPES:
        given = f"{words.dtype}{list(words.shape)}" if hasattr(words, "dtype") else type(key).__name__
        raise TypeError(
            f"{name}: key must be a JAX PRNG key (jax.random.key(0) or jax.random.PRNGKey(0)), got {given}."
        )
    if shape:
        raise TypeError(
            f"{name}: key must be one PRNG key, got an array of keys of shape {tuple(shape)}. Give each example its "
            "own by jax.vmap over the keys, or use one of them."
        )
    return jnp.asarray(words)


# --- the torch side ------------------------------------------------------------------------------


def draws(op: Any, arguments: dict[str, Any]) -> bool:
    """Whether an aten op draws random numbers with these arguments: dropout of zero or in evaluation does not."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    rates = _DROPOUT_RATES.get(op.overloadpacket.__name__, ("dropout", "dropout_p"))
    return not (
        any(arguments.get(rate) == 0 for rate in rates)
        or any(arguments.get(mode) is False for mode in ("train", "training"))
    )


def refuse(name: str, op: Any, remedy: str) -> RandomnessError:
    """The error for a random op without a key."""
    return RandomnessError(
        f"{name} draws random numbers ({op}) but was given no key. {remedy}, or switch it off (dropout: by the "
        "module's evaluation mode)."
    )


class WithKey(Mode):
    """Within it, random ops draw from a key, given by its words: uint32[n], under `torch.func.vmap` one per example."""

    def __init__(self, key: torch.Tensor):
        super().__init__()
        self._batch, self._keys = _examples(key)
        self._on_device = None
        if self._keys is not None and can_draw(self._keys.device):
            self._on_device = DeviceDraws(self._keys, self._batch)

    @functools.cached_property
    def words(self) -> list[list[int]] | None:
        """The words of each example's key, which the host has to read; None on fake tensors."""
        with DisableTorchFunction():  # no value that the callable reads
            return None if self._keys is None else self._keys.tolist()

    @functools.cached_property
    def _generators(self) -> "list[_Generators]":
        """Those of each example, seeded by its key."""
        return [_Generators(_seed(row)) for row in self.words or ()]

    def op(self, func: Any, args: Any, kwargs: Any) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags or not draws(func, bound(func, args, kwargs)):
            return func(*args, **kwargs)
        _refuse_checkpoint(func)
        with self:
            drawn = func.decompose(*args, **kwargs)  # under `torch.inference_mode` ops come undecomposed
        if drawn is not NotImplemented:
            return drawn
        if self._batch:
            self._check_batch(func, args, kwargs)
        if self._keys is None:
            return func(*args, **kwargs)
        if self._on_device is not None and _device(args, kwargs).type == self._keys.device.type:
            drawn = self._on_device.draw(func, args, kwargs)
            if drawn is not NotImplemented:
                return drawn
        rows = self._rows(func, args, kwargs) if self._batch else [(args, kwargs)]
        outs = [_draw(g, func, *row) for g, row in zip(self._generators, rows, strict=True)]
        if not self._batch:
            return outs[0]
        return args[0] if _is_in_place(func) else self._join(outs)

    def _check_batch(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise for an op that does not draw for the whole batch, along its leading axes."""
        names = [a.name for a in func._schema.arguments]
        values = [*zip(names, args, strict=False), *kwargs.items()]
        shapes = [tuple(v.shape) if isinstance(v, torch.Tensor) else tuple(v) for k, v in values if _is_batched(k, v)]
        n = len(self._batch)
        if func.overloadpacket.__name__ not in _EXAMPLE_BY_EXAMPLE or any(s[:n] != self._batch for s in shapes):
            raise RuntimeError(f"{func} cannot draw for each example of a batch at once")

    def _rows(self, func: Any, args: Any, kwargs: Any) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        """The arguments of each example."""
        n, names = len(self._batch), [a.name for a in func._schema.arguments]

        def row(name: str, value: Any, index: tuple[int, ...]) -> Any:
            if not _is_batched(name, value):
                return value
            return value[index] if isinstance(value, torch.Tensor) else value[n:]

        for index in np.ndindex(*self._batch):
            yield (
                [row(k, v, index) for k, v in zip(names, args, strict=False)],
                {k: row(k, v, index) for k, v in kwargs.items()},
            )

    def _join(self, outs: Sequence[Any]) -> Any:
        if isinstance(outs[0], tuple):
            return tuple(self._join(column) for column in zip(*outs, strict=True))
        return torch.stack(list(outs)).unflatten(0, self._batch)


def _refuse_checkpoint(op: Any) -> None:
    """The backward pass would run the op again where no key is: with another mask."""
    if in_checkpoint():
        raise RandomnessError(
            f"Random numbers are drawn ({op}) inside torch.utils.checkpoint, whose second run, in the backward pass, "
            "would draw others. Leave it out (in transformers, `model.gradient_checkpointing_disable()`), and put "
            "`jax.checkpoint` around the call to save memory."
        )


def _is_batched(name: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor) or name == "size"


def _examples(key: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor | None]:
    """The sizes of the enclosing `torch.func.vmap`s, outermost first, and the words of each example's key: [n, words].

    On fake tensors there are no words. Axes that are no vmap's (a natively batched call) are words too.
    """
    interpreters = transforms()
    levels = [(i.level(), i.batch_size()) for i in interpreters if isinstance(i, VMAP_TRANSFORM)]
    axes: dict[int, int] = {}
    while is_batched(key):
        level, axis = batch_of(key)
        axes[level], key = axis, unwrapped(key)
    batch = tuple(size for _, size in sorted(levels))
    if isinstance(key, FakeTensor):
        return batch, None
    with without_transforms():
        for i, (level, _) in enumerate(sorted(levels)):  # an axis is counted among those of inner levels
            key = key.movedim(axes[level] + i, i) if level in axes else key.unsqueeze(i)
        key = key.expand(*batch, *key.shape[len(batch) :])
        return batch, key.reshape(math.prod(batch), -1)


def _seed(words: Sequence[int]) -> int:
    """64 bits of all words of a key: a seed of torch's CPU generator is cut to 32, and split keys differ in any."""
    return int.from_bytes(hashlib.blake2b(np.array(words, np.uint32).tobytes(), digest_size=8).digest(), "little")


class _Generators:
    """The generators of one key, one for each kind of device."""

    def __init__(self, seed: int):
        self._seed = seed
        self._made: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator for a device."""
        if device not in self._made:
            self._made[device] = torch.Generator(device).manual_seed(self._seed)
        return self._made[device]


def _draw(generators: _Generators, func: Any, args: Any, kwargs: Any) -> Any:
    """Run a random op with one's own generator, on contiguous memory: layouts would change the order of the numbers."""
    generator = generators.on(_device(args, kwargs))
    given = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in args]
    drawn = _with_generator(generator, func, given, kwargs)
    for written, x in zip(args, given, strict=True):
        if func._schema.is_mutable and x is not written:
            written.copy_(x)
    return args[0] if _is_in_place(func) else drawn


def _is_in_place(func: Any) -> bool:
    written = func._schema.arguments[0].alias_info
    return written is not None and written.is_write


def _device(args: Any, kwargs: Any) -> torch.device:
    tensor = next((x for x in args if isinstance(x, torch.Tensor)), None)
    device = kwargs.get("device") if tensor is None else tensor.device
    return torch.device(device or "cpu")


def _with_generator(generator: torch.Generator, func: Any, args: Any, kwargs: Any) -> Any:
    seeded = _seeded(func)
    if seeded is not None:
        return seeded(**bound(seeded, args, kwargs) | {"generator": generator})
    if func.overloadpacket.__name__ == "native_dropout" and generator.device.type == "cpu":
        return _native_dropout(generator, *args, **kwargs)
    with _default_lock:  # what another thread draws from torch's own generator meanwhile, it draws from the key
        default = _default_generator(generator.device)
        before = default.get_state()
        default.set_state(generator.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            generator.set_state(default.get_state())
            default.set_state(before)


def _native_dropout(
    generator: torch.Generator, x: torch.Tensor, p: float, train: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's kernel, which takes no generator."""
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
    return (x * mask).mul_(0.0 if p == 1 else 1 / (1 - p)), mask


_default_lock = threading.Lock()


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]


@functools.cache
def _seeded(func: Any) -> Any:
    """The overload of a random op that takes a generator, if it has one."""
    arguments = {(a.name, str(a.type)) for a in func._schema.arguments} | {("generator", "Optional[Generator]")}
    overloads = (getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads())
    return next((o for o in overloads if {(a.name, str(a.type)) for a in o._schema.arguments} == arguments), None)
