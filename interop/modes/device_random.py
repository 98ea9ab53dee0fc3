"""Random numbers on a GPU that follow from a key in its memory, without reading it on the host.

torch's generators want their seed from the host, which would wait for all work before the key. So here random bits come
from the key itself (`philox.py`), by an op that a replay can repeat, and distributions are made of them by torch's own
ops, in torch's precision: 24 bits in float32, 53 in float64. Other numbers than torch's generators give.

Distributions that are not here (gamma, Poisson, permutations) draw as on the CPU.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .aten import bound

_MANTISSA = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_LOW_32 = 2**32 - 1

_library = torch.library.Library("torchleaf", "DEF")
_library.define("random_bits(Tensor keys, int n, int index) -> Tensor")


def _bits_on_gpu(keys: torch.Tensor, n: int, index: int) -> torch.Tensor:
    from .philox import bits  # Triton is there where torch is built for CUDA

    return bits(keys, n, index)


_library.impl("random_bits", _bits_on_gpu, "CUDA")
_library.impl("random_bits", lambda keys, n, _: keys.new_empty((keys.shape[0], n), dtype=torch.int32), "Meta")


@functools.cache
def can_draw(device: torch.device) -> bool:
    """Whether keys on a device need not be read by the host."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


class DeviceDraws:
    """The draws of one call, in order.

    **Arguments:**

    - `keys`: the words of each example's key: uint32[examples, words].
    - `batch`: the sizes of the enclosing `torch.func.vmap`s, whose product is the number of examples.
    """

    def __init__(self, keys: torch.Tensor, batch: Sequence[int]):
        self._keys, self._batch, self._index = keys, tuple(batch), 0

    def draw(self, op: Any, args: Any, kwargs: Any) -> Any:
        """What a random op gives; NotImplemented for one that is not here."""
        rule = _RULES.get(op.overloadpacket.__name__)
        return NotImplemented if rule is None else rule(self, bound(op, args, kwargs))

    def bits(self, shape: Sequence[int], words: int = 1) -> torch.Tensor:
        """Random bits: int32[words, *shape]."""
        n = math.prod(shape) // max(1, math.prod(self._batch)) * words
        drawn = torch.ops.torchleaf.random_bits(self._keys, n, self._index)
        self._index += 1
        return drawn.view(*self._batch, words, *shape[len(self._batch) :]).movedim(len(self._batch), 0)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype, *, inside: bool = False) -> torch.Tensor:
        """Multiples of the dtype's precision in [0, 1), or the middles between them."""
        mantissa = _MANTISSA[dtype]
        if dtype == torch.float64:
            high, low = self.bits(shape, 2).to(torch.int64)
            numbers = ((high & 2**21 - 1) << 32 | low & _LOW_32).to(torch.float64)
        else:
            numbers = (self.bits(shape)[0] & 2**mantissa - 1).to(torch.float32)
        return ((numbers + 0.5 if inside else numbers) * 2.0**-mantissa).to(dtype)

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Standard normal numbers, by the Box-Muller transform."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        radius = (-2 * self.uniform(shape, exact, inside=True).log()).sqrt()
        return (radius * (2 * math.pi * self.uniform(shape, exact)).cos()).to(dtype)

    def integers(self, shape: Sequence[int], low: int, high: int) -> torch.Tensor:
        """Integers in [low, high), of all 64 bits where 32 are too few, as torch draws them."""
        if high - low < 2**32:
            return (self.bits(shape)[0].to(torch.int64) & _LOW_32) % (high - low) + low
        first, second = self.bits(shape, 2).to(torch.int64)
        return ((first & 2**31 - 1) << 32 | second & _LOW_32) % (high - low) + low


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: that of the result would round."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _of_shape(draw: Callable[[DeviceDraws, Sequence[int], torch.dtype, dict[str, Any]], Any]) -> Any:
    """A rule for ops that make a tensor: of `size`, or like another tensor."""

    def rule(draws: DeviceDraws, arguments: dict[str, Any]) -> Any:
        like = arguments.get("self")
        shape = arguments["size"] if like is None else like.shape
        dtype = arguments.get("dtype")
        if not isinstance(dtype, torch.dtype):  # none given
            dtype = torch.get_default_dtype() if like is None else like.dtype
        return draw(draws, shape, dtype, arguments)

    return rule


def _in_place(draw: Callable[[DeviceDraws, Sequence[int], torch.dtype, dict[str, Any]], Any]) -> Any:
    """A rule for ops that fill a tensor."""

    def rule(draws: DeviceDraws, arguments: dict[str, Any]) -> torch.Tensor:
        target = arguments["self"]
        return target.copy_(draw(draws, target.shape, target.dtype, arguments))

    return rule


def _uniform_between(draws: DeviceDraws, shape: Sequence[int], dtype: torch.dtype, given: dict[str, Any]) -> Any:
    low, high = given["from"], given["to"]
    return draws.uniform(shape, dtype) * (high - low) + low


def _coins(draws: DeviceDraws, shape: Sequence[int], dtype: torch.dtype, given: dict[str, Any]) -> torch.Tensor:
    p = given["p"]
    exact = p.dtype if isinstance(p, torch.Tensor) and p.dtype == torch.float64 else torch.float32
    return (draws.uniform(shape, exact) < p).to(dtype)


def _bernoulli(draws: DeviceDraws, given: dict[str, Any]) -> torch.Tensor:
    p = given["self"] if given.get("p") is None else given["p"]
    return _coins(draws, given["self"].shape, given["self"].dtype, {"p": p})


def _native_dropout(draws: DeviceDraws, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    x, p = given["input"], given["p"]
    mask = draws.uniform(x.shape, torch.float32) < 1 - p
    return x * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


def _normal(draws: DeviceDraws, given: dict[str, Any]) -> torch.Tensor:
    mean, std = given["mean"], given["std"]
    tensors = [x for x in (mean, std) if isinstance(x, torch.Tensor)]
    shape = torch.broadcast_shapes(*(x.shape for x in tensors)) if tensors else given["size"]
    dtype = tensors[0].dtype if tensors else given.get("dtype") or torch.get_default_dtype()
    return draws.normal(shape, dtype) * std + mean


def _gaussian(draws: DeviceDraws, shape: Sequence[int], dtype: torch.dtype, given: dict[str, Any]) -> torch.Tensor:
    return draws.normal(shape, dtype) * given["std"] + given["mean"]


def _integers(draws: DeviceDraws, shape: Sequence[int], dtype: torch.dtype, given: dict[str, Any]) -> Any:
    if isinstance(given["high"], torch.Tensor):
        return NotImplemented
    is_default = "size" in given and not isinstance(given.get("dtype"), torch.dtype)
    return draws.integers(shape, given.get("low") or 0, given["high"]).to(torch.int64 if is_default else dtype)


def _random(draws: DeviceDraws, given: dict[str, Any]) -> Any:
    target, low, high = given["self"], given.get("from") or 0, given.get("to")
    return NotImplemented if high is None else target.copy_(draws.integers(target.shape, low, high))


def _exponential(draws: DeviceDraws, shape: Sequence[int], dtype: torch.dtype, given: dict[str, Any]) -> Any:
    return -draws.uniform(shape, _exact(dtype), inside=True).log() / given["lambd"]


def _log_normal(draws: DeviceDraws, shape: Sequence[int], dtype: torch.dtype, given: dict[str, Any]) -> torch.Tensor:
    return (draws.normal(shape, _exact(dtype)) * given["std"] + given["mean"]).exp()


def _cauchy(draws: DeviceDraws, shape: Sequence[int], dtype: torch.dtype, given: dict[str, Any]) -> torch.Tensor:
    angle = draws.uniform(shape, _exact(dtype), inside=True) - 0.5
    return given["median"] + given["sigma"] * (math.pi * angle).tan()


def _geometric(draws: DeviceDraws, shape: Sequence[int], dtype: torch.dtype, given: dict[str, Any]) -> torch.Tensor:
    return (draws.uniform(shape, _exact(dtype), inside=True).log() / math.log1p(-given["p"])).ceil()


_RULES: dict[str, Callable[[DeviceDraws, dict[str, Any]], Any]] = {
    "rand": _of_shape(lambda draws, shape, dtype, _: draws.uniform(shape, dtype)),
    "rand_like": _of_shape(lambda draws, shape, dtype, _: draws.uniform(shape, dtype)),
    "randn": _of_shape(lambda draws, shape, dtype, _: draws.normal(shape, dtype)),
    "randn_like": _of_shape(lambda draws, shape, dtype, _: draws.normal(shape, dtype)),
    "randint": _of_shape(_integers),
    "randint_like": _of_shape(_integers),
    "bernoulli": _bernoulli,
    "native_dropout": _native_dropout,
    "normal": _normal,
    "random_": _random,
    "uniform_": _in_place(_uniform_between),
    "bernoulli_": _in_place(_coins),
    "normal_": _in_place(_gaussian),
    "exponential_": _in_place(_exponential),
    "log_normal_": _in_place(_log_normal),
    "cauchy_": _in_place(_cauchy),
    "geometric_": _in_place(_geometric),
}
