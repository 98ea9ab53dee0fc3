"""The way from compiled programs to torch and back: XLA's FFI, and `jax.pure_callback` where it is missing."""

import gc
import threading
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close
from fresh_process import run_python
from samples import ALL, NARROW, dtype_id, raw_bytes, sample
from torch._subclasses.fake_tensor import FakeTensor
from torchleaf import to_jax, torch_function
from torchleaf.interop.transport import lowering
from torchleaf.interop.transport.program import program_of

X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5


@pytest.fixture
def callback(monkeypatch):
    """No FFI target for any platform, as on systems without jax-tvm-ffi."""
    monkeypatch.setattr(lowering, "_registered_platforms", frozenset)
    lowering._warn_about_callback.cache_clear()


@pytest.fixture(params=["ffi", "callback"])
def route(request):
    """Both routes, without the warning of the second."""
    if request.param == "callback":
        request.getfixturevalue("callback")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torchleaf has no XLA FFI target")
        yield request.param


# --- values --------------------------------------------------------------------------------------


def _check_passes_through(dtype, shape):
    """An operand and a result in the middle of a program of several ops keep their bits."""
    array = to_jax(sample(dtype, shape), copy=True)
    fn = torch_function(lambda x: (x.clone(), x.reshape(-1)))
    copied, flat = jax.jit(lambda x: jax.tree.map(jnp.ravel, fn(x[None])))(array)
    assert copied.dtype == flat.dtype == array.dtype
    assert raw_bytes(copied) == raw_bytes(flat) == raw_bytes(array)


@pytest.mark.parametrize("shape", [(2, 3), (), (0, 2)], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)
def test_every_dtype_passes_through(dtype, shape, route):
    _check_passes_through(dtype, shape)


@pytest.mark.parametrize("dtype", ALL[len(NARROW) :], ids=dtype_id)
def test_wide_dtypes_pass_through_under_x64(dtype, route, x64):
    for shape in ((2, 3), (), (0, 2)):
        _check_passes_through(dtype, shape)


def test_complex_results_keep_infinities_and_signs(route):
    z = jnp.array([complex(np.inf, np.nan), complex(-0.0, 0.0), complex(1.0, -np.inf)], jnp.complex64)
    assert raw_bytes(torch_function(torch.clone)(z)) == raw_bytes(z)
    assert raw_bytes(torch_function(torch.conj)(z)) == raw_bytes(np.conj(np.asarray(z)))


def test_many_operands_and_results(route):
    xs = [X + i for i in range(150)]
    got = jax.jit(torch_function(lambda xs: [x * 2 for x in xs]))(xs)
    assert_trees_close(got, [2 * x for x in xs])


def test_several_calls_in_one_program(route):
    f, g = torch_function(torch.sin), torch_function(lambda x: (x @ x.mT, x.sum(0)))

    @jax.jit
    def program(x):
        a, b = g(f(x) + 1)
        return jax.lax.fori_loop(0, 3, lambda _, c: c * 0.5 + f(c), a) @ a, jnp.cumsum(f(b))

    def twin(x):
        y = jnp.sin(x) + 1
        a, b = y @ y.T, y.sum(0)
        return jax.lax.fori_loop(0, 3, lambda _, c: c * 0.5 + jnp.sin(c), a) @ a, jnp.cumsum(jnp.sin(b))

    assert_trees_close(program(X), twin(X))


@pytest.mark.long
def test_gradients(route):
    def loss(f, w, x):
        return (f(x @ w) ** 2).sum()

    def in_jax(w, x):
        return loss(lambda y: jnp.tanh(y) * (1 + 2j) * y, w, x).real

    def in_torch(w, x):
        return loss(torch_function(lambda y: torch.tanh(y) * (1 + 2j) * y), w, x).real

    w = jnp.arange(12.0).reshape(3, 4) / 10
    for transform in (jax.value_and_grad, lambda f: jax.jit(jax.value_and_grad(f, (0, 1))), jax.hessian):
        assert_trees_close(transform(in_torch)(w, X), transform(in_jax)(w, X), rtol=1e-4)
    batched = jax.jit(jax.vmap(jax.grad(in_torch), (None, 0)))
    assert_trees_close(batched(w, X[:, None]), jax.vmap(jax.grad(in_jax), (None, 0))(w, X[:, None]), rtol=1e-4)


def test_no_copy_on_the_way():
    """Torch reads XLA's own operand and writes XLA's own result: the program is one call."""
    pointers = []

    def look(x):
        if not isinstance(x, FakeTensor):
            pointers.append(x.data_ptr())
        return x + 1

    tensor = torch.arange(64.0)
    fn = torch_function(look)
    assert_trees_close(fn(to_jax(tensor)), jnp.arange(64.0) + 1)
    assert pointers == [tensor.data_ptr()]
    program = jax.jit(fn).lower(jnp.arange(64.0)).compile().as_text()
    assert program.count('custom_call_target="torchleaf_call"') == 1
    assert "copy(" not in program
    assert "callback" not in program


def test_callback_warns_once(callback):
    message = r"no XLA FFI target for cpu.*jax-tvm-ffi.*jax\.pure_callback"
    with pytest.warns(UserWarning, match=message) as record:
        jax.jit(torch_function(torch.sin))(X)
    assert len(record) == 1
    jax.jit(torch_function(torch.cos))(X)  # a warning would be an error
    torch_function(torch.cos)(X + 1)


def test_callback_carries_torch_errors(route):
    def refuse(x):
        if x.numpy().sum() > 0:
            raise ValueError("too large")
        return x

    fn = jax.jit(torch_function(refuse))
    assert_trees_close(fn(X - 1), X - 1)
    with pytest.raises((RuntimeError, ValueError), match="refuse raised ValueError: too large"):
        jax.block_until_ready(fn(X + 1))


# --- programs ------------------------------------------------------------------------------------


def test_ahead_of_time_compilation(route):
    fn = torch_function(lambda x, k: x.sin() * k["a"])
    k = {"a": jnp.arange(3.0)}
    lowered = jax.jit(jax.value_and_grad(lambda x, k: fn(x, k).sum())).lower(X, k)
    compiled = lowered.compile()
    jax.clear_caches()
    for x in (X, X + 1):
        assert_trees_close(compiled(x, k), jax.value_and_grad(lambda x: (jnp.sin(x) * k["a"]).sum())(x))


def test_lowering_from_shapes_alone():
    fn = torch_function(torch.cumsum)
    compiled = jax.jit(lambda x: fn(x, 0)).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile()
    assert_trees_close(compiled(jnp.arange(4.0)), jnp.cumsum(jnp.arange(4.0)))


def test_evaluation_at_trace_time(route):
    fn = torch_function(torch.exp)

    @jax.jit
    def program(x):
        with jax.ensure_compile_time_eval():
            constant = fn(jnp.ones(3))
            value = float(constant[0])
        return x * value + fn(x)

    assert_trees_close(program(X), X * float(jnp.exp(1.0)) + jnp.exp(X))


@pytest.mark.parametrize("fn", [lambda x: x * 2, lambda x: x.mul_(2)], ids=["pure", "in place"])
def test_donated_operand(fn, route):
    tensor = torch.arange(64.0)
    donating = jax.jit(torch_function(fn), donate_argnums=0)
    for array in (to_jax(tensor), jnp.arange(64.0) + 0):
        assert_trees_close(donating(array), 2 * jnp.arange(64.0))
        assert array.is_deleted()
    assert torch.equal(tensor, torch.arange(64.0))


def test_donation_in_a_training_loop():
    fn = torch_function(lambda w, x: ((x @ w) ** 2).mean())
    step = jax.jit(lambda w, x: w - 0.1 * jax.grad(fn)(w, x), donate_argnums=0)
    twin = jax.jit(lambda w, x: w - 0.1 * jax.grad(lambda w: ((x @ w) ** 2).mean())(w))
    tensor = torch.ones(3)
    w, expected = to_jax(tensor), jnp.ones(3)
    for _ in range(5):
        w, expected = step(w, X), twin(expected, X)
    assert_trees_close(w, expected)
    assert torch.equal(tensor, torch.ones(3))


def test_calls_from_several_threads():
    fn = torch_function(lambda x, n: (x * n).cumsum(0))
    results = {}

    def work(n):
        x = jnp.arange(float(n)) + 1
        results[n] = [np.asarray(fn(x, n)), np.asarray(jax.jit(lambda x: fn(x, n))(x)), np.asarray(jnp.cumsum(x * n))]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.keys() == set(range(1, 9))
    for eager, jitted, expected in results.values():
        np.testing.assert_allclose(eager, expected, rtol=1e-6)
        np.testing.assert_allclose(jitted, expected, rtol=1e-6)


# --- the life of a callable ----------------------------------------------------------------------


class Doubler:
    def __call__(self, x):
        return x * 2


def _forget():
    jax.clear_caches()
    gc.collect()


def test_an_executable_keeps_the_callable_alive_and_no_longer(route):
    def build():
        doubler = Doubler()
        fn = torch_function(doubler)
        assert_trees_close(jax.jit(jax.grad(lambda x: fn(x).sum()))(X), jnp.full((2, 3), 2.0))
        assert_trees_close(jax.vmap(fn)(X), 2 * X)
        return weakref.ref(doubler), jax.jit(lambda x: fn(x) + 1).lower(X).compile()

    alive, compiled = build()
    _forget()
    assert alive() is not None
    assert_trees_close(compiled(X), 2 * X + 1)
    del compiled
    _forget()
    assert alive() is None


def test_a_live_function_survives_cleared_caches():
    fn = torch_function(Doubler())
    jitted = jax.jit(fn)
    for _ in range(2):
        assert_trees_close((fn(X), jitted(X)), (2 * X, 2 * X))
        _forget()


def _raw_call(number):
    """The program that a `torch_call` of this number compiles to."""
    return jax.ffi.ffi_call("torchleaf_call", [jax.ShapeDtypeStruct((2, 3), jnp.float32)])(X, number=np.int64(number))


def test_a_call_that_is_not_alive():
    fn = torch_function(Doubler())
    assert_trees_close(fn(X), 2 * X)
    [specialized] = fn._specialized.values()
    number = program_of(specialized.call, repeats=False).number
    assert_trees_close(_raw_call(number), [2 * X])
    del fn, specialized
    _forget()
    for dead in (number, 12345):
        with pytest.raises(RuntimeError, match=r"not alive in this process.*another one.*Trace and compile it here"):
            jax.block_until_ready(_raw_call(dead))


@pytest.mark.long
def test_programs_in_the_persistent_cache_are_safe(tmp_path):
    """A second process must not run the first one's programs with its own callables."""
    script = """
        import sys, jax, jax.numpy as jnp, torch
        from torchleaf import torch_function
        first = torch_function(lambda x: x * FACTOR)
        print(float(jax.jit(lambda x: first(x) + 1)(jnp.float32(10.0))), float(first(jnp.float32(10.0))))
    """
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for factor in (2, 3):
        assert run_python(script.replace("FACTOR", str(factor)), **cache) == f"{10 * factor + 1}.0 {10 * factor}.0\n"
        assert any(tmp_path.iterdir())


@pytest.mark.long
def test_exit_while_a_program_runs():
    script = """
        import time, jax, jax.numpy as jnp, torch
        from torch._subclasses.fake_tensor import FakeTensor
        from torchleaf import torch_function

        def slow(x):
            if not isinstance(x, FakeTensor):
                time.sleep(0.5)
            return x * 2

        program = jax.jit(lambda x: torch_function(slow)(x + 1) + 1)
        program(jnp.ones(3)), program(jnp.zeros(3))
        print("done")
    """
    assert run_python(script) == "done\n"
