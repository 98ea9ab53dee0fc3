"""What is recorded of a compiled program's torch calls, what is not, and the code that a recording becomes."""

import random
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close, from_torch
from samples import as_torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torchleaf.interop.calls import execution, residuals
from torchleaf.interop.calls.residuals import live_graphs
from torchleaf.interop.replay import cuda_graphs, recording, replays
from torchleaf.interop.replay.recording import Recorder as Recording
from torchleaf.interop.replay.replays import OUT_VARIANTS, codes_of
from watching import OpLog, Recorder

RUNS = 6
X = twins.normal((4, 3))[0]


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- functions that are not the same each time -------------------------------------------------------


def scaled_by(scale, f=lambda x: x):
    """A torch function that scales by the next number, and the numbers it used."""
    used = []

    def function(x):
        factor = scale()
        if not isinstance(x, torch._subclasses.FakeTensor):
            used.append(float(factor))
        return f(x * factor)

    return function, used


def counter():
    count = iter(range(1, 1000))
    return lambda: next(count)


def counting_tensor():
    number = counter()
    return lambda: torch.tensor([float(number())] * 3).sum()


def array_tensor():
    number = counter()
    return lambda: torch.from_numpy(np.full((), number(), np.float32))


def swapped_tensor():
    """The function replaces a tensor that it captured."""
    held = [torch.ones(())]

    def scale():
        held[0] = torch.full((), held[0].item() + 1)
        return held[0]

    return scale


SCALES = {
    "a counter": counter,
    "Python's random": lambda: random.Random(0).random,
    "NumPy's random": lambda: np.random.default_rng(0).random,
    "a tensor of Python data": counting_tensor,
    "a tensor on an array": array_tensor,
    "a tensor that is replaced": swapped_tensor,
}
scales = pytest.mark.parametrize("name", SCALES)


@scales
def test_numbers_that_change_show_in_every_run(name):
    function, used = scaled_by(SCALES[name]())
    program = jax.jit(torchleaf.torch_function(function, out_shape=jax.ShapeDtypeStruct(X.shape, X.dtype)))
    for _ in range(RUNS):
        y = jax.block_until_ready(program(X))
        close(y, X * used[-1])


@scales
def test_numbers_that_change_show_in_every_gradient(name):
    function, used = scaled_by(SCALES[name](), torch.sin)
    function = torchleaf.torch_function(function, out_shape=jax.ShapeDtypeStruct(X.shape, X.dtype))
    step = jax.jit(jax.value_and_grad(lambda x: function(x).sum()))
    for _ in range(RUNS):
        value, grad = jax.block_until_ready(step(X))
        factor = used[-1]
        close((value, grad), (jnp.sin(X * factor).sum(), factor * jnp.cos(X * factor)))


def test_what_is_cached_in_the_first_run():
    cache = {}

    def function(x):
        if not isinstance(x, torch._subclasses.FakeTensor) and "table" not in cache:
            cache["table"] = torch.arange(3.0) + 1
        return x * cache.get("table", torch.ones(3))

    program = jax.jit(torchleaf.torch_function(function))
    for run in range(RUNS):
        close(program(X + run), (X + run) * jnp.arange(1.0, 4.0))


def test_ops_on_another_thread():
    """Zeros in the first runs hide what is missing."""

    def function(x):
        y = torch.zeros_like(x)
        thread = threading.Thread(target=lambda: y.add_(x))
        thread.start()
        thread.join()
        return y

    program = jax.jit(torchleaf.torch_function(function))
    for run in range(RUNS):
        x = X * max(0, run - 2)
        close(program(x), x)


# --- tensors captured from outside -------------------------------------------------------------------


def test_a_captured_tensor_changed_between_runs():
    weight = torch.ones(3)
    step = jax.jit(jax.value_and_grad(lambda x: torchleaf.torch_function(lambda x: x * weight)(x).sum()))
    for run in range(RUNS):
        weight.fill_(run)
        close(step(X), (run * X.sum(), jnp.full_like(X, run)))


def test_captured_weights_after_steps_of_an_optimizer():
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    program = jax.jit(torchleaf.torch_function(module.forward))
    for _ in range(RUNS):
        y = module(as_torch(X))
        close(program(X), from_torch(y))
        y.sum().backward()
        optimizer.step()


def test_captured_weights_after_a_loaded_state_dict():
    module = nn.Linear(3, 3)
    program = jax.jit(torchleaf.torch_function(module.forward))
    for _ in range(RUNS):
        module.load_state_dict(nn.Linear(3, 3).state_dict())
        close(program(X), from_torch(module(as_torch(X))))


# --- values, masks, random numbers -------------------------------------------------------------------


def reads(x):
    return x * x.sum().item() if x[0, 0] > 0 else x.exp()


def masks(x):
    y = x[x > 0]
    return torch.nn.functional.pad(y, (0, x.numel() - len(y)))


def finds(x):
    rows = torch.nonzero(x[:, 0] > 0)[:, 0]
    return x.index_select(0, rows).sum(0)


def lists(x):
    return x * max(x.flatten().tolist())


def picks(x):
    return x[x[:, 0].argmax()]


def counts_unique(x):
    return x * len(torch.unique(x > 0))


READERS = [(reads, (4, 3)), (masks, (12,)), (finds, (3,)), (lists, (4, 3)), (picks, (3,)), (counts_unique, (4, 3))]


@pytest.mark.parametrize(("reader", "shape"), READERS, ids=lambda p: getattr(p, "__name__", ""))
def test_functions_that_read_values(reader, shape):
    function = torchleaf.torch_function(reader, out_shape=jax.ShapeDtypeStruct(shape, jnp.float32))
    step = jax.jit(jax.value_and_grad(lambda x: function(x).sum()))
    for run in range(RUNS):
        (x,) = twins.normal((4, 3), seed=run)
        leaf = as_torch(x).requires_grad_()
        y = reader(leaf).sum()
        y.backward()
        close(step(x), from_torch((y, leaf.grad)))


@pytest.mark.parametrize("keyed", [nn.functional.dropout, torch.rand_like, torch.bernoulli], ids=lambda f: f.__name__)
def test_random_numbers_are_those_of_eager_calls(keyed):
    function = torchleaf.torch_function(lambda x: x * keyed(x.sigmoid()))
    step = jax.value_and_grad(lambda x, key: function(x, key=key).sum())
    compiled = jax.jit(step)
    drawn = set()
    for run in range(2 * RUNS):
        args = X + run // 2, jax.random.key(run // 2)
        actual = compiled(*args)
        close(actual, step(*args))
        drawn.add(float(actual[0]))
    assert len(drawn) == RUNS


# --- errors ------------------------------------------------------------------------------------------

AT_RUN_TIME = (RuntimeError, ValueError)
LOOKUPS = {
    "embedding": (lambda ids, w: nn.functional.embedding(ids, w), "index out of range in self"),
    "gather": (lambda ids, w: w.gather(0, ids[:, None]), "out of bounds"),
    "index_select": (lambda ids, w: w.index_select(0, ids), "index out of range"),
    "index": (lambda ids, w: w[ids], "out of bounds"),
}


@pytest.mark.parametrize("bad_runs", [[0], [1], [2, 3], [3]], ids=str)
@pytest.mark.parametrize("name", LOOKUPS)
def test_an_error_in_one_run(name, bad_runs):
    lookup, message = LOOKUPS[name]
    function = torchleaf.torch_function(lookup)
    programs = [jax.jit(function), jax.jit(jax.grad(lambda w, ids: jnp.square(function(ids, w)).sum()))]
    (w,) = twins.normal((5, 3))
    for run in range(RUNS):
        ids = jnp.array([run % 5, 2, 9 if run in bad_runs else 4])
        if run not in bad_runs:
            leaf = as_torch(w).requires_grad_()
            y = lookup(as_torch(ids).long(), leaf)
            y.square().sum().backward()
            close([programs[0](ids, w), programs[1](w, ids)], from_torch([y, leaf.grad]))
            continue
        for program, args in zip(programs, [(ids, w), (w, ids)], strict=True):
            with pytest.raises(AT_RUN_TIME, match=message):
                jax.block_until_ready(program(*args))
    assert live_graphs() == 0


# --- custom autograd functions -----------------------------------------------------------------------


class Custom(torch.autograd.Function):
    """`x**2 * y`; subclasses say how `backward` computes."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        ctx.square = x.square()
        return ctx.square * y

    @classmethod
    def gradients(cls, ctx, grad):
        x, y = ctx.saved_tensors
        return 2 * x * y * grad, ctx.square * grad


class WithTorch(Custom):
    @staticmethod
    def backward(ctx, grad):
        return Custom.gradients(ctx, grad)


class WithNumPy(Custom):
    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.from_numpy(g.numpy() * 1.0) for g in Custom.gradients(ctx, grad))


class WithValues(Custom):
    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        factor = x.flatten()[0].item()  # another number each time
        return tuple(g + factor - factor for g in Custom.gradients(ctx, grad)) if factor else (x, y)


class WithValuesAsList(Custom):
    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.tensor(g.tolist()) for g in Custom.gradients(ctx, grad))


class InPlace(Custom):
    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        for_y = ctx.square * grad
        return grad.mul_(2).mul_(x).mul_(y), for_y


CUSTOM = [twins.Opaque, WithTorch, WithNumPy, WithValues, WithValuesAsList, InPlace]


@pytest.mark.parametrize("residuals", ["live", "recompute"])
@pytest.mark.parametrize("custom", CUSTOM, ids=lambda c: c.__name__)
def test_custom_autograd_functions(custom, residuals):
    function = torchleaf.torch_function(lambda x, y: custom.apply(x * 1.0, y), residuals=residuals)
    step = jax.jit(jax.value_and_grad(lambda x, y: jnp.sin(function(x, y)).sum(), (0, 1)))
    expected = jax.value_and_grad(lambda x, y: jnp.sin(x**2 * y).sum(), (0, 1))
    for run in range(RUNS):
        x, y = twins.normal((4, 3), (4, 3), seed=run)
        close(step(x, y), expected(x, y))
    assert live_graphs() == 0


def test_gradient_hooks():
    def function(x):
        y = x.sin()
        if y.requires_grad:
            y.register_hook(lambda g: g.clamp(-0.5, 0.5))
        return y

    step = jax.jit(jax.grad(lambda x: jnp.square(torchleaf.torch_function(function)(x)).sum()))
    for run in range(RUNS):
        x = X + run
        close(step(x), jnp.cos(x) * jnp.clip(2 * jnp.sin(x), -0.5, 0.5))


# --- limits ------------------------------------------------------------------------------------------


def many_adds(x):
    for _ in range(30):
        x = x + 1
    return x


@pytest.mark.parametrize(
    ("module", "limit", "value"),
    [(recording, "_MOST_STEPS", 29), (recording, "_MOST_BYTES", X.nbytes - 1), (execution, "LARGE", 1)],
    ids=["ops", "outputs", "operations"],
)
def test_beyond_a_limit_python_runs_each_time(module, limit, value, monkeypatch):
    monkeypatch.setattr(module, limit, value)
    recorder = Recorder(many_adds)
    program = jax.jit(torchleaf.torch_function(recorder))
    for run in range(RUNS):
        close(program(X + run), X + run + 30)
    assert len(recorder.computed) == RUNS


def test_at_the_limits_a_call_is_recorded(monkeypatch):
    monkeypatch.setattr(recording, "_MOST_STEPS", 30)
    monkeypatch.setattr(recording, "_MOST_BYTES", X.nbytes)
    recorder = Recorder(many_adds)
    program = jax.jit(torchleaf.torch_function(recorder))
    for run in range(RUNS):
        close(program(X + run), X + run + 30)
    assert len(recorder.computed) == 2


@pytest.mark.long
def test_thousands_of_ops():
    def function(x):
        for _ in range(recording._MOST_STEPS + 1):
            x = x + 1
        return x

    step = jax.jit(jax.value_and_grad(lambda x: torchleaf.torch_function(function)(x).sum()))
    for _ in range(3):
        close(step(X), ((X + recording._MOST_STEPS + 1).sum(), jnp.ones_like(X)))


# --- what a recorder refuses -------------------------------------------------------------------------


def recorded(function, *inputs):
    recorder = Recording()
    recorder.record(inputs, lambda: function(*inputs))
    return recorder


OUTSIDE = torch.zeros(4, 3)
REFUSED = [
    (lambda x: x.nonzero(), "nonzero.default depends on values"),
    (lambda x: x[x > 0], "index.Tensor depends on values"),
    (lambda x: x.masked_select(x > 0), "masked_select.default depends on values"),
    (lambda x: nn.functional.dropout(x), "draws random numbers"),
    (lambda x: torch.rand(3, generator=torch.Generator()), "draws random numbers"),
    (lambda x: OUTSIDE.add_(x), "add_.Tensor writes into a tensor from outside"),
    (lambda x: x.mul_(2), "mul_.Tensor writes into a tensor from outside"),
    (lambda x: nn.functional.batch_norm(x, OUTSIDE[0], OUTSIDE[1], training=True), "writes into a tensor from outside"),
    (lambda x: x.to_sparse(), "no tensor of plain memory"),
    (lambda x: torch.complex(x, x), "no tensor of plain memory"),
    (lambda x: x.clone().resize_(2, 6), "resize_.default changes the memory"),
]


@pytest.mark.parametrize(("function", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_refused(function, reason):
    recorder = recorded(lambda x: (function(x),), torch.randn(4, 3))
    assert reason in recorder.failure


# --- code --------------------------------------------------------------------------------------------


def code_of(function, *inputs, for_a_gpu=False):
    recorder = recorded(function, *inputs)
    assert recorder.failure is None
    for result in recorder.parts[0].results:
        result.is_on_gpu = for_a_gpu
    (code,) = codes_of(recorder)
    return code


def replayed(code, inputs, *results):
    """The ops that a replay runs."""
    log = OpLog()
    log.wrap(code.compile())([], *inputs, *results)
    return dict(log.counts)


T = torch.randn(4, 3)


def test_ops_of_no_consequence_are_left_out():
    def function(x):
        x.exp().sum()
        return (x.tanh(),)

    result = torch.empty(4, 3)
    assert replayed(code_of(function, T), [T], result) == {"tanh": 1}
    assert torch.equal(result, T.tanh())


def test_writes_count():
    def function(x):
        y = torch.zeros_like(x)
        y.view(-1)[:2].copy_(x[0, :2])
        return (y,)

    result = torch.empty(4, 3)
    ops = replayed(code_of(function, T), [T], result)
    assert ops["zeros_like"] == 1
    assert torch.equal(result, function(T)[0])


@pytest.fixture
def nested_op():
    """An op with nested results and a number, as those of cuDNN's recurrent layers and of flash attention have."""
    library = torch.library.Library("torchleaf_nested", "FRAGMENT")
    library.define("parts(Tensor x, int n) -> (Tensor, Tensor[], SymInt, Tensor)")
    library.impl("parts", lambda x, n: (x.sin(), [x * i for i in range(n)], x.shape[0], x.new_empty(0)), "CPU")
    yield torch.ops.torchleaf_nested.parts
    library._destroy()


def test_nested_results(nested_op):
    def function(x):
        first, (second, third), n, _ = nested_op(x, 2)
        return first + n * third, second

    code = code_of(function, T)
    for x in (T, T + 1):
        results = torch.empty(4, 3), torch.empty(4, 3)
        assert replayed(code, [x], *results)["parts"] == 1
        for result, expected in zip(results, function(x), strict=True):
            assert torch.equal(result, expected)


def over_memory(tensor, size):
    """A view made as torch's C++ makes it of weights for cuDNN: an empty tensor that is set to their memory."""
    with torch._C.DisableTorchFunction():
        storage = tensor.untyped_storage()
    whole = torch.empty(0).set_(storage)
    return whole if whole.numel() == size else torch.empty(0).set_(storage, 0, (size,), (1,))


def test_tensors_set_to_memory_are_views():
    weights = torch.arange(7.0)

    def function(x):
        parts = torch.cat([x.reshape(-1), 2 * x[0]]).split([12, 3])
        return over_memory(parts[1], 15).sin(), over_memory(weights[2:], 6).exp(), over_memory(x, 12).cos()

    code = code_of(function, T)
    for x in (T, T + 1):
        weights += 1
        results = torch.empty(15), torch.empty(6), torch.empty(12)
        replayed(code, [x], *results)
        for result, expected in zip(results, function(x), strict=True):
            assert torch.equal(result, expected)


def test_gradients_by_tensors_set_to_memory():
    class Joined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a, b):
            joined = over_memory(a, a.numel() + b.numel())
            ctx.save_for_backward(x, joined)
            ctx.size = a.numel()
            return x * joined.sum() + joined.pow(2).sum()

        @staticmethod
        def backward(ctx, ct):
            x, joined = ctx.saved_tensors
            gradient = (ct * x).sum() + 2 * joined * ct.sum()
            return ct * joined.sum(), gradient[: ctx.size], gradient[ctx.size :]

    def by_joined(w, v, x):
        sizes = [w.numel(), v.numel()]
        return Joined.apply(x, *torch.cat([w.reshape(-1), v]).split(sizes))

    def twin(w, v, x):
        joined = jnp.concatenate([w.ravel(), v])
        return x * joined.sum() + (joined**2).sum()

    recorder = Recorder(by_joined)
    ours, expected = (
        jax.jit(jax.value_and_grad(lambda *xs, f=f: (f(*xs) ** 2).sum(), (0, 1, 2)))
        for f in (torchleaf.torch_function(recorder), twin)
    )
    for run in range(RUNS):
        xs = twins.normal((3, 2), (4,), (5,), seed=run)
        close(ours(*xs), expected(*xs))
    assert len(recorder.computed) < RUNS  # the others were replayed


def test_results_are_written_where_they_belong():
    """No copy: the op has an `out` variant."""
    result = torch.empty(4, 3)
    pointer = result.data_ptr()
    assert replayed(code_of(lambda x: (x.sin().tanh(),), T), [T], result) == {"sin": 1, "tanh": 1}
    assert torch.equal(result, T.sin().tanh())
    assert result.data_ptr() == pointer


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x,),
        lambda x: (x.tanh()[1:],),
        lambda x: (x.tanh().T,),
        lambda x: (x.sum(0).expand(4, 3),),
        lambda x: (x.tanh().view(torch.int32),),
        lambda x: (x.tanh().mul_(2),),
    ],
    ids=["argument", "slice", "transposed", "expanded", "other dtype", "written into"],
)
def test_other_results_are_copied(function):
    (expected,) = function(T)
    result = torch.empty(expected.shape, dtype=expected.dtype)
    assert replayed(code_of(function, T), [T], result)["copy_"] == 1
    assert torch.equal(result, expected)


def test_a_result_twice_is_computed_once():
    def function(x):
        y = x.tanh()
        return y, y

    results = torch.empty(4, 3), torch.empty(4, 3)
    assert replayed(code_of(function, T), [T], *results) == {"tanh": 1, "copy_": 2}
    assert all(torch.equal(r, T.tanh()) for r in results)


@pytest.mark.parametrize("op", OUT_VARIANTS, ids=str)
def test_an_out_variant_takes_the_same_arguments(op):
    *given, out = OUT_VARIANTS[op]._schema.arguments
    assert [(a.name, str(a.type)) for a in given] == [(a.name, str(a.type)) for a in op._schema.arguments]
    assert out.alias_info.is_write


class Living(TorchDispatchMode):
    """Counts the tensors, made by ops, that live at once."""

    def __init__(self):
        super().__init__()
        self._made, self.most = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._made.append(weakref.ref(out))
        self.most = max(self.most, sum(ref() is not None for ref in self._made))
        return out


def test_tensors_live_until_they_are_used_for_the_last_time():
    def function(x):
        for _ in range(20):
            x = (x + 1).reshape(3, 4).T.reshape(4, 3)
        return (x * 2,)

    run, result = code_of(function, T).compile(), torch.empty(4, 3)
    with Living() as living:
        run([], T, result)
    assert torch.equal(result, function(T)[0])
    assert living.most <= 3 + 1  # `result` is one of them


def made_by_the_way(x):
    first = x.exp()  # has no `out` variant
    y = first
    for _ in range(20):
        y = y.abs()
    return first, y


def written_later(x):
    y = x.exp()
    view = y.view(-1)
    z = y.cos()
    view.add_(1)
    return y, z


def given_and_captured(x):
    return x, CAPTURED, CAPTURED.exp(), x.T


CAPTURED = torch.linspace(0, 1, 6)


@pytest.mark.parametrize("function", [made_by_the_way, written_later, given_and_captured])
def test_an_output_is_copied_when_nothing_writes_it_any_more(function):
    run, expected = code_of(function, T).compile(), function(T)
    results = [torch.empty_like(y) for y in expected]
    with Living() as living:
        run([], T, *results)
    for result, y in zip(results, expected, strict=True):
        assert torch.equal(result, y)
    assert living.most <= 3 + len(results)


def test_a_recording_holds_no_memory_of_what_the_ops_make():
    def function(x):
        for _ in range(20):
            x = x + 1
            with torch._C.DisableTorchFunction():  # else memory is handed out, which no recording can follow
                storages.append(StorageWeakRef(x.untyped_storage()))
            living.append(sum(not storage.expired() for storage in storages))
        return (x,)

    storages, living = [], []
    code_of(function, T)
    assert max(living) <= 3


def test_memory_of_an_earlier_part_means_nothing_in_a_later_one():
    """XLA's is freed in between, so that the later part may find tensors of its own in the same place."""
    recorder = Recording()
    inputs = [torch.randn(4, 3) for _ in range(50)]
    recorder.record(inputs, lambda: (torch.zeros(()),))
    inputs.clear()
    recorder.record((T,), lambda: tuple(T.sin().tanh() for _ in range(20)))
    results = [torch.empty(4, 3) for _ in range(20)]
    assert replayed(codes_of(recorder)[1], [T], *results) == {"sin": 20, "tanh": 20}


@pytest.mark.parametrize(("waiting", "together"), [(10, 1), (2, 1), (1, 0)])
def test_on_a_gpu_outputs_are_copied_together(waiting, together, monkeypatch):
    """A copy costs a launch there. Those of another geometry are copied alone, as are all others."""

    def function(x):
        written = x.sin()
        result = x.cos(), written, x.exp().t(), x.neg(), x
        written.mul_(2)
        return result

    monkeypatch.setattr(replays, "_MOST_WAITING", waiting * T.nbytes)
    monkeypatch.setattr(replays, "Captured", lambda run, n_inputs: run)
    code, inputs = code_of(function, T, for_a_gpu=True), T + 1
    results = [torch.full_like(y, torch.nan, memory_format=torch.contiguous_format) for y in function(inputs)]
    ops = replayed(code, [inputs], *results)
    assert ops.get("_foreach_copy_", 0) == together
    for found, expected in zip(results, function(inputs), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("depth", [2, 20])
def test_what_is_there_at_a_time_decides_on_captures(depth, monkeypatch):
    """Views of an operand, and an output that is made in its place, need no memory."""

    def function(x):
        y = x.t()
        for _ in range(depth):
            y = y.sin()
        return (y.t().contiguous() @ x.t(),)

    x = torch.randn(6, 6)
    for most, captured in ((2 * x.nbytes, True), (2 * x.nbytes - 1, False)):
        monkeypatch.setattr(replays, "MOST_BYTES", most)
        assert isinstance(code_of(function, x, for_a_gpu=True).compile(), cuda_graphs.Captured) == captured


def test_recordings_of_other_numbers_are_the_same():
    function = lambda x: ((x * 2.5).softmax(-1),)  # noqa: E731
    assert code_of(function, T).same_as(code_of(function, T + 1))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: (x * 2.5,), lambda x: (x * 3.5,)),
        (lambda x: (x * 2,), lambda x: (x * 2.0,)),
        (lambda x: (x * True,), lambda x: (x * 1,)),
        (lambda x: (x.sum(0),), lambda x: (x.sum(1)[:3],)),
        (lambda x: (x.sin(),), lambda x: (x.cos(),)),
        (lambda x: (x * 0.0,), lambda x: (x * -0.0,)),
        (lambda x: (x + torch.tensor([1.0, 2.0, 3.0]),), lambda x: (x + torch.tensor([1.0, 2.0, 3.0]),)),
    ],
    ids=["number", "type", "bool", "axis", "op", "sign of zero", "constant"],
)
def test_recordings_that_differ(one, other):
    assert not code_of(one, T).same_as(code_of(other, T))


def test_numbers_that_equal_no_number_are_the_same_in_two_recordings():
    function = lambda x: (x * float("nan"),)  # noqa: E731
    assert code_of(function, T).same_as(code_of(function, T))


# --- what is kept for the backward pass --------------------------------------------------------------


def memory(x):
    return range(x.unsafe_buffer_pointer(), x.unsafe_buffer_pointer() + x.nbytes)


def test_what_is_kept_is_never_memory_of_xla():
    function = torchleaf.torch_function(lambda x: torch.tanh(x[1:]) * x[:-1])
    forward, backward = jax.jit(lambda x: jax.vjp(function, x)), jax.jit(lambda pullback, y: pullback(y))
    for _ in range(3):
        y, pullback = forward(X)
        backward(pullback, y)
    y, pullback = jax.block_until_ready(forward(X))
    ((tape, *_),) = residuals._graphs.values()
    kept = [x.untyped_storage().data_ptr() for x in tape._kept]
    assert kept
    assert not any(pointer in memory(array) for pointer in kept for array in (X, y))
    backward(pullback, y)


def test_backward_passes_in_another_order():
    function = torchleaf.torch_function(lambda x: torch.tanh(x) * x.exp())
    forward, backward = jax.jit(lambda x: jax.vjp(function, x)), jax.jit(lambda pullback, y: pullback(y))
    for _ in range(3):
        waiting = [(X * k, *forward(X * k)) for k in range(4)]
        for x, y, pullback in waiting[::-1]:
            close(backward(pullback, y), jax.vjp(lambda x: jnp.tanh(x) * jnp.exp(x), x)[1](y))
    assert live_graphs() == 0
