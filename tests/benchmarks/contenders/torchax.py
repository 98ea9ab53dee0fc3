"""torchax (https://github.com/google/torchax): torch's operators on JAX arrays, all compiled by XLA."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax_programs
import torch
from cases import Case, Task
from steps import Step
from torch._ops import OpOverloadPacket


@contextlib.contextmanager
def _removed_overloads() -> Iterator[None]:
    """Releases up to 0.0.13 name operators on named tensors, which torch 2.13 has removed; nothing here uses them."""
    find = OpOverloadPacket.__getattr__

    def find_or_none(packet: OpOverloadPacket, name: str) -> Any:
        try:
            return find(packet, name)
        except AttributeError:
            if "name" not in name.lower() or name.startswith("__"):
                raise
            return None

    with mock.patch.object(OpOverloadPacket, "__getattr__", find_or_none):
        yield


with _removed_overloads():
    import torchax

    torchax.default_env()


def build(case: Case, task: Task) -> Step:
    return jax_programs.step(case, task, _wrap)


def _wrap(case: Case, module: torch.nn.Module) -> jax_programs.Apply:
    states, call = torchax.extract_jax(module)
    return lambda params, *inputs: call({**states, **params}, inputs)
