"""`jax_function` as a function: structures, dtypes, static leaves, memory, compilations."""

import collections
import copy
import gc
import pickle
import resource
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchleaf
from torchleaf.interop.jax_calls import kernel

Point = collections.namedtuple("Point", "x y")


def affine(x, *, scale=1.0, shift=None):
    return x * scale if shift is None else x * scale + shift


@torchleaf.jax_function
def decorated(x):
    return x + 1


def test_structures_are_kept():
    @torchleaf.jax_function
    def f(tree, *rest, named):
        return {"sum": tree["a"][0] + rest[0], "nested": (Point(named * 2, None), [tree["a"][1]])}

    a, b, c, d = (torch.randn(3) for _ in range(4))
    out = f({"a": (a, b)}, c, named=d)
    assert isinstance(out["nested"][0], Point)
    assert out["nested"][0].y is None
    torch.testing.assert_close(out["sum"], a + c)
    torch.testing.assert_close(out["nested"][0].x, d * 2)
    torch.testing.assert_close(out["nested"][1][0], b)


def test_decorator_with_and_without_parentheses():
    x = torch.randn(3)
    torch.testing.assert_close(torchleaf.jax_function()(jnp.sin)(x), torch.sin(x))
    torch.testing.assert_close(torchleaf.jax_function(jnp.sin)(x), torch.sin(x))


def test_as_a_method():
    class Scale:
        factor = 3.0

        @torchleaf.jax_function
        def __call__(self, x):
            return self.factor * x

        def scaled(self, x):
            return self.factor * x

        scaled_again = torchleaf.jax_function(scaled)

    x = torch.randn(3)
    torch.testing.assert_close(Scale()(x), 3 * x)
    torch.testing.assert_close(Scale.scaled_again(Scale(), x), 3 * x)


def test_an_attribute_of_an_instance_is_no_method():
    class Holder:
        def __init__(self):
            self.function = torchleaf.jax_function(jnp.sin)

    x = torch.randn(3)
    torch.testing.assert_close(Holder().function(x), torch.sin(x))


DTYPES = [
    torch.bool, torch.int8, torch.int16, torch.int32, torch.uint8, torch.float16, torch.bfloat16, torch.float32,
    torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 1, 3)], ids=str)
def test_dtypes_go_there_and_back(dtype, shape):
    x = torch.randint(0, 2, shape).to(dtype)
    seen = []

    @torchleaf.jax_function
    def f(x):
        seen.append(x.dtype)
        return jnp.concatenate([x[None], x[None]])

    out = f(x)
    assert seen[0] == torchleaf.to_jax(x).dtype
    assert out.dtype == (torch.int64 if dtype == torch.int32 else dtype)  # JAX's default integer stands for torch's
    assert out.shape == (2, *shape)
    assert torch.equal(out[1].to(torch.complex64), x.to(torch.complex64))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64, torch.complex128], ids=str)
def test_64_bits(dtype, x64):
    x = torch.arange(3).to(dtype)
    out = torchleaf.jax_function(lambda x: x + x)(x)
    assert out.dtype == dtype
    assert torch.equal(out, x + x)


def test_integers_are_torchs_default():
    scores = torch.randn(4, 5)
    labels = torchleaf.jax_function(lambda s: jnp.argmax(s, -1))(scores)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, scores.argmax(-1))
    big = torch.tensor([2**40])
    with pytest.raises(OverflowError, match=r"an operand of affine .*does not fit int32.*jax_enable_x64"):
        torchleaf.jax_function(affine)(big)


LAYOUTS = {
    "transposed": lambda x: x.T,
    "channels_last": lambda x: x.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(5, 4),
    "misaligned": lambda x: x.flatten()[1:],
    "reversed negative": lambda x: torch.complex(x, x).conj().imag,
    "conjugate": lambda x: torch.complex(x, x).conj(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x = LAYOUTS[layout](torch.randn(6, 4))
    torch.testing.assert_close(torchleaf.jax_function(lambda x: x * 2)(x), x * 2)


def test_one_compilation_a_signature():
    traces = []

    @torchleaf.jax_function
    def f(x, *, factor=2.0):
        traces.append((x.shape, factor))
        return jnp.sin(x) * factor

    def run(x, **kwargs):
        x = x.requires_grad_()
        f(x, **kwargs).sum().backward()
        return len(traces)

    first = run(torch.randn(3))
    assert run(torch.randn(3)) == run(torch.randn(6)[::2]) == first
    second = run(torch.randn(4))
    assert second > first
    third = run(torch.randn(3), factor=3.0)
    assert third > second
    assert run(torch.randn(3), factor=3.0) == run(torch.randn(4)) == run(torch.randn(3)) == third


def test_static_leaves_are_told_apart():
    @torchleaf.jax_function
    def f(x, flag, text, fn, number):
        assert isinstance(flag, bool)
        assert isinstance(text, str)
        return fn(x) * number if flag else -x

    x = torch.rand(3)
    torch.testing.assert_close(f(x, True, "a", jnp.sqrt, 2), x.sqrt() * 2)
    torch.testing.assert_close(f(x, False, "a", jnp.sqrt, 2), -x)
    kinds = torchleaf.jax_function(lambda n: jnp.zeros(()) if isinstance(n, float) else jnp.ones(()))
    assert [kinds(1).item(), kinds(1.0).item()] == [1, 0]


def test_arrays_of_jax_and_numpy_are_operands():
    traces = []

    @torchleaf.jax_function
    def f(x, y, z):
        traces.append(0)
        return x + y + z

    for value in (1.0, 2.0):
        out = f(torch.ones(2), jnp.full(2, value), np.full(2, value, np.float32))
        assert torch.equal(out, torch.full((2,), 1 + 2 * value))
    f_again = len(traces)
    f(torch.ones(2), jnp.zeros(2), np.zeros(2, np.float32))
    assert len(traces) == f_again


def test_a_typed_key_is_an_operand():
    f = torchleaf.jax_function(lambda x, k: x + jax.random.normal(k, x.shape))
    key = jax.random.key(3)
    torch.testing.assert_close(f(torch.zeros(4), key), torchleaf.to_torch(jax.random.normal(key, (4,))))


def test_no_copy_on_the_way_in_or_out(monkeypatch):
    """50 MB each way: JAX's arrays lie where torch's tensors do."""
    taken, given = [], []
    array, tensor = kernel._array, kernel.as_tensor
    monkeypatch.setattr(kernel, "_array", lambda *a: taken.append(array(*a)) or taken[-1])
    monkeypatch.setattr(kernel, "as_tensor", lambda y: given.append(y) or tensor(y))
    x = torch.randn(50 * 2**18)
    out = torchleaf.jax_function(lambda x: x + 1)(x)
    assert [a.unsafe_buffer_pointer() for a in taken] == [x.data_ptr()]
    assert [a.unsafe_buffer_pointer() for a in given] == [out.data_ptr()]


def test_outputs_have_memory_of_their_own():
    constant = jnp.arange(3.0)
    f = torchleaf.jax_function(lambda x: (x, x, constant, constant, jax.jit(lambda x: x)(x), x.reshape(3, 1), x + 1))
    x = torch.ones(3)
    outs = f(x)
    assert len({x.data_ptr(), constant.unsafe_buffer_pointer(), *(y.data_ptr() for y in outs)}) == 9
    for y in outs:
        y.fill_(7)
    assert torch.equal(x, torch.ones(3))
    assert constant.tolist() == [0, 1, 2]
    assert torch.equal(torchleaf.jax_function(lambda x: x)(x), x)


def test_an_identity_alone_has_memory_of_its_own():
    x = torch.ones(3)
    assert torchleaf.jax_function(lambda x: x)(x).data_ptr() != x.data_ptr()
    constant = jnp.ones(3)
    outs = [torchleaf.jax_function(lambda: constant)() for _ in range(2)]
    assert len({constant.unsafe_buffer_pointer(), *(y.data_ptr() for y in outs)}) == 3


def test_writing_after_the_call_changes_nothing():
    """XLA may still have been computing: the call waits."""
    f = torchleaf.jax_function(lambda x: jnp.linalg.matrix_power(x @ x.T, 4).sum(0))
    x = torch.randn(300, 300) / 300
    expected = torch.linalg.matrix_power(x @ x.T, 4).sum(0)
    out = f(x)
    x.fill_(float("nan"))
    torch.testing.assert_close(out, expected)


def test_memory_is_freed():
    x = torch.randn(1000)
    storage = weakref.ref(x.untyped_storage())
    out = torchleaf.jax_function(lambda x: x + 1)(x)
    del x
    gc.collect()
    assert storage() is None
    jax.clear_caches()
    gc.collect()
    assert torch.isfinite(out).all()


def test_without_tensors_and_without_outputs():
    assert torchleaf.jax_function(lambda: jnp.arange(3.0))().tolist() == [0, 1, 2]
    assert torchleaf.jax_function(lambda x: None)(torch.ones(2)) is None
    out = torchleaf.jax_function(lambda x: (1, 2.5, True))(torch.ones(2))
    assert [y.dtype for y in out] == [torch.int64, torch.float32, torch.bool]


def test_tensors_that_a_transform_left_behind():
    kept = []
    torch.func.grad(lambda x: kept.append(x * 2) or x.sum())(torch.ones(3))
    assert torch.equal(torchleaf.jax_function(lambda x: x + 1)(kept[0]), torch.full((3,), 3.0))


@pytest.mark.long
def test_2000_steps_do_not_grow_memory():
    f = torchleaf.jax_function(lambda x, w: jnp.tanh(x @ w).sum())
    x, w = torch.randn(64, 256), torch.randn(256, 256, requires_grad=True)
    optimizer = torch.optim.SGD([w], 1e-4)
    sizes = []
    for i in range(2000):
        optimizer.zero_grad()
        f(x, w).backward()
        optimizer.step()
        if i % 100 == 99:
            gc.collect()
            sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert sizes[-1] - sizes[4] < 20_000  # KiB at most; a weight a step would be 400,000
    alive = {x.unsafe_buffer_pointer() for x in jax.live_arrays() if x.shape == (256, 256)}
    assert alive <= {w.data_ptr(), w.grad.data_ptr()}


def test_in_threads():
    f = torchleaf.jax_function(lambda x: jnp.sin(x) ** 2)
    results = {}

    def work(i):
        x = torch.full((50,), float(i), requires_grad=True)
        for _ in range(20):
            (grad,) = torch.autograd.grad(f(x).sum(), x)
        results[i] = grad[0].item()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == pytest.approx({i: np.sin(2 * i) for i in range(4)}, abs=1e-5)


def test_copies_and_pickles():
    f = torchleaf.jax_function(optax.huber_loss)
    x = torch.randn(3)
    for again in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        torch.testing.assert_close(again(x), f(x))
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    assert f.__name__ == "huber_loss"
    assert repr(f) == "jax_function(huber_loss)"
