"""Of which kind a GPU's memory is, by a driver that is imitated."""

import ctypes
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from torchleaf.interop.values import gpu_memory


@pytest.fixture
def of_torchs(monkeypatch):
    """Addresses in one piece of memory; all others are mapped, as XLA's are."""
    addresses = set()

    def attribute(value, attribute, address):
        assert attribute == 10
        ctypes.cast(value, ctypes.POINTER(ctypes.c_uint64))[0] = address.value in addresses
        return 0

    monkeypatch.setattr(gpu_memory, "_driver", lambda: SimpleNamespace(cuPointerGetAttribute=attribute))
    gpu_memory._is_one_piece_of_xlas.cache_clear()
    yield addresses
    gpu_memory._is_one_piece_of_xlas.cache_clear()


def test_kinds(of_torchs):
    ours, torchs = jnp.ones(3), jnp.ones(3) + 1
    of_torchs.add(torchs.unsafe_buffer_pointer())
    assert gpu_memory.is_as_xlas(ours)
    assert not gpu_memory.is_as_xlas(torchs)
    assert gpu_memory.is_as_xlas(jnp.ones((0, 3)))


def test_memory_that_the_driver_does_not_know_is_of_no_kind(monkeypatch, of_torchs):
    assert gpu_memory.is_as_xlas(jnp.ones(3))
    monkeypatch.setattr(gpu_memory, "_driver", lambda: SimpleNamespace(cuPointerGetAttribute=lambda *_: 1))
    assert not gpu_memory.is_as_xlas(jnp.ones(3))
