"""What is found out by doing it: the transport of a call, shared memory, a value and a gradient."""

import platform
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ..function import torch_function
from ..transport.lowering import _registered_platforms
from ..values.arrays import to_jax, to_torch
from ..values.gpu_memory import is_as_xlas
from .report import Check, Finding, quoted

_TOLERANCE = 1e-2  # relative; TF32, where it is switched on, has three digits


@dataclass(frozen=True)
class Transport(Check):
    """Platforms with an XLA FFI target, JAX's platform, and whether torch saw XLA's own buffer in a compiled call.

    `error` says why jax-tvm-ffi cannot be imported; `has_wheel`, whether there is one for this system.
    """

    platforms: frozenset[str]
    backend: str
    shared: bool
    error: str
    has_wheel: bool

    @classmethod
    def gather(cls) -> "Transport":
        backend, error = jax.default_backend(), ""
        try:
            import jax_tvm_ffi as _  # noqa: F401
        except ImportError as exc:
            error = quoted(exc)
        has_wheel = sys.platform == "linux" or (sys.platform, platform.machine()) == ("darwin", "arm64")
        return cls(_registered_platforms(), backend, _shares_operand(), error, has_wheel)

    def findings(self) -> list[Finding]:
        if self.shared:
            value = f"XLA FFI ({', '.join(sorted(self.platforms))}): torch sees XLA's buffers"
            return [Finding("torch calls", value)]
        if not self.platforms:
            value = "jax.pure_callback: right, but every call copies"
            if not self.has_wheel:
                remedy = "jax-tvm-ffi, which saves the copies, has no wheel for this system."
                return [Finding("torch calls", value, "note", remedy)]
            return [Finding("torch calls", value, "problem", f"`pip install -U jax-tvm-ffi` ({self.error})")]
        value = f"operands are copied on {self.backend}"
        remedy = f"XLA FFI targets are registered for {', '.join(sorted(self.platforms))} only."
        return [Finding("torch calls", value, "problem", remedy)]


def _shares_operand() -> bool:
    """Whether the memory that a compiled call reads is that of the array it is given."""
    seen = set[int]()

    def probe(x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:  # not traced
            seen.add(x.data_ptr())
        return x + 1

    x = jnp.zeros(64, jnp.float32)
    jax.block_until_ready(jax.jit(torch_function(probe))(x))
    return jax.default_backend() in ("cpu", "gpu") and x.unsafe_buffer_pointer() in seen


@dataclass(frozen=True)
class Views(Check):
    """Conversions of which the memory was compared, such as `to_jax on cpu`, and whether it was shared; and whether
    torch's memory on the GPU is of another kind than XLA's."""

    shared: dict[str, bool]
    are_two_kinds: bool = False

    @classmethod
    def gather(cls) -> "Views":
        jax.default_backend()  # fails where JAX does not start
        shared, are_two_kinds = {}, False
        for device, backend in (("cpu", "cpu"), ("cuda", "gpu")):
            if (device == "cpu" or torch.cuda.is_available()) and _has_backend(backend):
                tensor = torch.zeros(64, device=device)
                array = to_jax(tensor)
                shared[f"to_jax on {device}"] = array.unsafe_buffer_pointer() == tensor.data_ptr()
                shared[f"to_torch on {device}"] = to_torch(array).data_ptr() == array.unsafe_buffer_pointer()
                are_two_kinds |= device == "cuda" and not is_as_xlas(array)
        return cls(shared, are_two_kinds)

    def findings(self) -> list[Finding]:
        copied = [name for name, shared in self.shared.items() if not shared]
        if copied:
            remedy = "Results are right; writes to one side do not show on the other, and each conversion takes memory."
            return [Finding("shared memory", f"{', '.join(copied)}: copies", "problem", remedy)]
        found = [Finding("shared memory", ", ".join(self.shared) or "no device that both frameworks have")]
        if self.are_two_kinds:
            remedy = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, set before torch uses it, makes them views."
            value = "torch's is of another kind than XLA's: weights on the GPU are copied when they are wrapped"
            found.append(Finding("kinds of memory", value, "note", remedy))
        return found


def _has_backend(name: str) -> bool:
    try:
        return bool(jax.local_devices(backend=name))
    except RuntimeError:  # JAX has no such platform
        return False


@dataclass(frozen=True)
class Call(Check):
    """How far a compiled torch call's value and gradient are from torch's own, relative to the largest."""

    value: float
    gradient: float

    @classmethod
    def gather(cls) -> "Call":
        def probe(x: torch.Tensor) -> torch.Tensor:
            return torch.sin(x @ x.T).sum()

        numbers = np.linspace(-1, 1, 128 * 128, dtype=np.float32).reshape(128, 128)  # long enough for torch's thread
        tensor = torch.from_numpy(numbers).requires_grad_()
        expected = probe(tensor)
        (expected_gradient,) = torch.autograd.grad(expected, tensor)
        value, gradient = jax.jit(jax.value_and_grad(torch_function(probe)))(numbers)
        return cls(_distance(value, expected), _distance(gradient, expected_gradient))

    def findings(self) -> list[Finding]:
        wrong = {name: off for name, off in vars(self).items() if not off <= _TOLERANCE}  # also when it is NaN
        if wrong:
            value = ", ".join(f"the {name} is {off:.2g} off" for name, off in wrong.items())
            remedy = "Numbers cannot be trusted here. Reinstall the versions in constraints.txt, and report it."
            return [Finding("numbers", value, "broken", remedy)]
        return [Finding("numbers", "value and gradient are torch's")]


def _distance(ours: jax.Array, theirs: torch.Tensor) -> float:
    expected = theirs.detach().numpy()
    return float(np.max(np.abs(np.asarray(ours) - expected)) / np.max(np.abs(expected)))
