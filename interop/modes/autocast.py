"""What a thread of torch's has switched on around a call: autocast and inference mode.

A call computes what it was traced for, on whichever thread XLA runs it. So autocast is part of its signature and is
entered again for every run; inference mode, in which torch keeps no graphs, is left.

Source: [autocast](https://docs.pytorch.org/docs/stable/amp.html),
[inference mode](https://docs.pytorch.org/docs/stable/generated/torch.autograd.grad_mode.inference_mode.html).
"""

import contextlib
from collections.abc import Iterator

import torch

Autocast = tuple[tuple[str, torch.dtype], ...]
OFF: Autocast = ()
_DEVICES = ("cpu", "cuda")


def autocast_here() -> Autocast:
    """The devices for which this thread has autocast on, each with the dtype."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in _DEVICES if torch.is_autocast_enabled(d))


@contextlib.contextmanager
def autocast(wanted: Autocast) -> Iterator[None]:
    """Autocast as `wanted`, whatever it is here."""
    with contextlib.ExitStack() as stack:
        for device in _DEVICES:
            dtype = dict(wanted).get(device)
            if dtype != dict(autocast_here()).get(device):
                # Its cache of converted weights would keep operands, whose memory is XLA's.
                stack.enter_context(torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False))
        yield


def neutral() -> contextlib.AbstractContextManager[None]:
    """Neither autocast nor inference mode."""
    is_neutral = not (torch.is_inference_mode_enabled() or any(map(torch.is_autocast_enabled, _DEVICES)))
    return _NO_CHANGE if is_neutral else _neutral()


@contextlib.contextmanager
def _neutral() -> Iterator[None]:
    with torch.inference_mode(False), autocast(OFF):
        yield


_NO_CHANGE = contextlib.nullcontext()


def without_inference(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The same memory as tensors that autograd accepts: those made in inference mode never are."""
    if not tensors or not tensors[0].is_inference():  # one thread makes all of a call's
        return tensors
    with torch.inference_mode(False):
        fresh = [torch.empty(0, dtype=x.dtype, device=x.device) for x in tensors]
        return tuple(y.set_(x.untyped_storage(), 0, x.shape, x.stride()) for x, y in zip(tensors, fresh, strict=True))
