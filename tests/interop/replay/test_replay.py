"""Compiled programs that replay recordings of their torch calls: the results are torch's, run after run."""

import contextlib
import gc
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
import twins
from compare import assert_same_bits, assert_trees_close, from_torch
from samples import as_torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torchleaf.interop.calls.residuals import live_graphs
from torchleaf.interop.replay.recording import Recorder as Recording
from torchleaf.interop.transport import lowering
from watching import Recorder

RUNS = 6
"""Two are recorded; the others replay."""


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- modules: the bits of torch ----------------------------------------------------------------------


def cnn():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())


def encoder_layer():
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


MODULES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)), (5, 6)),
    "lstm": (lambda: Recurrent(nn.LSTM(6, 4, num_layers=2, batch_first=True)), (2, 5, 6)),
    "gru": (lambda: Recurrent(nn.GRU(6, 4, bidirectional=True)), (2, 5, 6)),
    "cnn in evaluation": (lambda: cnn().eval(), (2, 2, 8, 8)),
    "attention": (lambda: SelfAttention().eval(), (2, 5, 4)),
    "encoder": (lambda: encoder_layer().eval(), (2, 5, 4)),
    "softmax": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.0), nn.Softmax(-1)), (5, 6)),
    "conv transpose": (lambda: nn.Sequential(nn.ConvTranspose1d(6, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()), (2, 6, 5)),
}

modules = pytest.mark.parametrize("name", MODULES)
residuals = pytest.mark.parametrize("residuals", ["live", "recompute"])


def new_weights(module, seed):
    """Draw weights anew; returned as arrays of their own memory."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return {name: torchleaf.to_jax(p.detach(), copy=True) for name, p in module.named_parameters()}


def native(module, x, cotangent, residuals):
    """Output and gradients of parameters and input; some kernels of the forward differ where gradients are recorded."""
    with torch.set_grad_enabled(residuals == "live"):
        y = module(x).detach()
    x = x.clone().requires_grad_()
    grads = torch.autograd.grad(module(x), [*module.parameters(), x], cotangent)
    return from_torch((y, dict(zip(dict(module.named_parameters()), grads, strict=False)), grads[-1]))


def pulled_back(model, x, cotangent):
    y, pullback = jax.vjp(lambda params, x: with_params(model, params)(x), model.params, x)
    return (y, *pullback(cotangent))


def with_params(model, params):
    return eqx.tree_at(lambda model: model.params, model, params)


@residuals
@modules
def test_gradients_have_the_bits_of_torch_in_every_run(name, residuals):
    make, shape = MODULES[name]
    module = make()
    model = torchleaf.TorchModule(make().train(module.training), residuals=residuals)
    step = eqx.filter_jit(pulled_back)
    cotangent_shape = module(torch.zeros(shape)).shape
    for run in range(RUNS):
        x, cotangent = torch.randn(shape), torch.randn(cotangent_shape)
        params = new_weights(module, run)
        result = step(with_params(model, params), torchleaf.to_jax(x), torchleaf.to_jax(cotangent))
        assert_same_bits(result, native(module, x, cotangent, residuals))


@modules
def test_outputs_have_the_bits_of_torch_in_every_run(name):
    make, shape = MODULES[name]
    module = make()
    model, call = torchleaf.TorchModule(make().train(module.training)), eqx.filter_jit(lambda model, x: model(x))
    for run in range(RUNS):
        x = torch.randn(shape)
        y = call(with_params(model, new_weights(module, run)), torchleaf.to_jax(x))
        with torch.no_grad():
            assert_same_bits(y, from_torch(module(x)))


@residuals
def test_batch_statistics_have_the_bits_of_torch_in_every_run(residuals):
    module = cnn()
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(cnn(), residuals=residuals)

    @eqx.filter_jit
    def step(model, state, x, cotangent):
        def function(params, x):
            return with_params(model, params)(x, state=state)

        y, pullback, state = jax.vjp(function, model.params, x, has_aux=True)
        return state, (y, *pullback(cotangent))

    for run in range(RUNS):
        params, x = new_weights(module, run), torch.randn(4, 2, 8, 8)
        y = module(x.requires_grad_())
        cotangent = torch.randn_like(y)
        expected = torch.autograd.grad(y, [*module.parameters(), x], cotangent)
        arrays = torchleaf.to_jax(x.detach()), torchleaf.to_jax(cotangent)
        state, (out, grads, x_grad) = step(with_params(model, params), state, *arrays)
        assert_same_bits(
            [out, *(grads[name] for name, _ in module.named_parameters()), x_grad], from_torch([y, *expected])
        )
        assert_same_bits(state.get(model.buffer_index), from_torch(dict(module.named_buffers())))


# --- when Python runs --------------------------------------------------------------------------------

X = twins.normal((4, 3))[0]
PROGRAMS = {
    "forward": (lambda f: f, "live", 2),
    "live gradient": (lambda f: jax.grad(lambda x: f(x).sum()), "live", 2),
    "recomputing gradient": (lambda f: jax.grad(lambda x: f(x).sum()), "recompute", 2),
    "gradient under vmap": (lambda f: jax.vmap(jax.grad(lambda x: f(x).sum())), "live", 2),
    "jvp": (lambda f: lambda x: jax.jvp(f, (x,), (x,))[1], "recompute", 2),
    "scan": (lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, 3)[0], "live", 2),
}
programs = pytest.mark.parametrize("name", PROGRAMS)


def runs_of_python(program, residuals, wrap=jax.jit, **options):
    """How often Python has computed after each of some runs on new input."""
    recorder = Recorder(lambda x: torch.tanh(x) * x)
    step = wrap(program(torchleaf.torch_function(recorder, residuals=residuals, **options)))
    twin = program(lambda x: jnp.tanh(x) * x)
    counts = []
    for run in range(RUNS):
        x = X + run / 10
        close(step(x), twin(x))
        counts.append(len(recorder.computed))
    return counts


@programs
@pytest.mark.usefixtures("no_proofs")
def test_python_runs_in_the_first_two_runs_only(name):
    """And for the proof of a plan, after the first one, which is left out here."""
    program, residuals, n_runs = PROGRAMS[name]
    assert runs_of_python(program, residuals)[-1] == n_runs


def test_forward_mode_of_what_kept_graphs_in_vain():
    """Its first runs keep graphs, until it shows that nobody asks for them; then two are recorded."""
    counts = runs_of_python(lambda f: lambda x: jax.jvp(f, (x,), (x,))[1], "live")
    assert counts[-1] == counts[-2]


@programs
def test_python_runs_each_time_without_replay(name):
    program, residuals, _ = PROGRAMS[name]
    counts = runs_of_python(program, residuals, replay=False)
    assert all(after > before for before, after in itertools.pairwise(counts))


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "scan"])  # JAX compiles its body
def test_python_runs_each_time_in_eager_calls(name):
    program, residuals, _ = PROGRAMS[name]
    counts = runs_of_python(program, residuals, wrap=lambda f: f)
    assert all(after > before for before, after in itertools.pairwise(counts))


def test_a_module_without_replay_runs_each_time():
    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(type(x))
            return super().forward(x)

    calls = []
    model, call = torchleaf.TorchModule(Counting(3, 2), replay=False), eqx.filter_jit(lambda model, x: model(x))
    call(model, X)
    n_calls = len(calls)
    for _ in range(RUNS):
        call(model, X)
    assert len(calls) == n_calls + RUNS


def test_another_shape_is_recorded_anew():
    recorder = Recorder(torch.sin)
    call = jax.jit(torchleaf.torch_function(recorder))
    for run in range(RUNS):
        for n in (2, 3):
            close(call(X[:n] + run), jnp.sin(X[:n] + run))
    assert recorder.computed == [(2, 3), (3, 3)] * 2


# --- arguments and outputs ---------------------------------------------------------------------------


def test_one_array_for_two_parameters_in_the_first_runs():
    function = torchleaf.torch_function(lambda x, y: torch.outer(x, y.sin()))
    step = jax.jit(jax.value_and_grad(lambda x, y: jnp.sin(function(x, y)).sum(), (0, 1)))
    expected = jax.value_and_grad(lambda x, y: jnp.sin(jnp.outer(x, jnp.sin(y))).sum(), (0, 1))
    for run in range(RUNS):
        x, y = twins.normal((3,), (3,), seed=run)
        args = (x, x) if run < 3 else (x, y)
        close(step(*args), expected(*args))


def add_in_place(x):
    y = x.clone()
    y.add_(1).mul_(x)
    return y


def squeeze_in_place(x):
    y = x * 2
    y.unsqueeze_(0).transpose_(0, 1).squeeze_()
    return y, y.T


def relu_in_place(x):
    y = x.exp() - 1
    torch.relu_(y)
    return y


def assign_slices(x):
    y = torch.zeros_like(x)
    y[1:] = x[:-1] * 2
    y[:, 0] += x[:, 1]
    return y


def index_put(x):
    y = x.clone()
    y.index_put_((torch.tensor([0, 0, 2]),), x[:3], accumulate=True)
    return y


def mask_put(x):
    y = x.clone()
    y[x > 0] = -1.0
    return y


def write_into_the_argument(x):
    x += 1
    return x.sin(), x


def two_views_of_one(x):
    y = x.cos()
    return y, y[1:], y.T, y.view(-1), y


def write_after_a_view(x):
    y = x.cos()
    row = y[0]
    y.mul_(2)
    return row, y


def write_through_a_view(x):
    y = x.cos()
    y.view(-1)[::2] = 3.0
    return y


def loop_with_a_graph_inside(x):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        return torch.autograd.grad((y**3).sum(), y)[0]


def functional_inside(x):
    return torch.func.vmap(torch.func.grad(lambda row: row.sin().prod()))(x)


FUNCTIONS = {
    "the argument": lambda x: x,
    "the argument and more": lambda x: (x, x.sin(), x),
    "a view of the argument": lambda x: (x[1:], x.T, x.reshape(-1)),
    "the same twice": lambda x: [x.sin()] * 2,
    "views of an output": two_views_of_one,
    "transposed": lambda x: x.sin().T,
    "expanded": lambda x: x.sum(0).expand(5, 3),
    "sliced": lambda x: x.exp()[1:, ::2],
    "reshaped": lambda x: x.exp().reshape(2, 6),
    "flipped": lambda x: x.exp().flip(0),
    "chunks": lambda x: x.exp().chunk(3, dim=1),
    "unbound": lambda x: torch.unbind(x.exp()),
    "of size zero": lambda x: (x.sin()[:0], x[2:2] * 2),
    "0-d": lambda x: (x.sum(), x[0, 0] * 2),
    "bool and int": lambda x: (x > 0, x.argmax(0), x.sign().int(), x.sort(0)),
    "a constant": lambda x: (torch.ones(2), torch.arange(3), x * 2),
    "half": lambda x: (x.half().exp(), x.half(), x.sum(dtype=torch.float16)),
    "bfloat16": lambda x: (x.bfloat16().exp(), x.bfloat16() @ x.bfloat16().T),
    "double rounded": lambda x: (x.double().sum(), x.double().exp().mean(0)),
    "complex": lambda x: torch.fft.rfft(x),
    "complex inside": lambda x: torch.fft.rfft(x).abs(),
    "statistics": lambda x: (torch.var_mean(x, 0), x.median(1), torch.aminmax(x)),
    "decompositions": lambda x: torch.linalg.qr(x),
    "NaN and infinity": lambda x: (x * float("nan"), x.masked_fill(x > 0, float("-inf")), -0.0 * x, 0.0 * x),
    "add_": add_in_place,
    "squeeze_": squeeze_in_place,
    "relu_": relu_in_place,
    "slices assigned": assign_slices,
    "index_put_": index_put,
    "mask assigned": mask_put,
    "argument written": write_into_the_argument,
    "write after a view": write_after_a_view,
    "write through a view": write_through_a_view,
    "out=": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "autograd inside": loop_with_a_graph_inside,
    "torch.func inside": functional_inside,
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x.sin()),
    "where": lambda x: torch.where(x > 0, x, x.exp()),
    "interpolation": lambda x: nn.functional.interpolate(x[None], scale_factor=2.0, mode="linear"),
    "scatter": lambda x: torch.zeros(4, 3).scatter_add(0, torch.tensor([[0, 1, 2], [3, 3, 0]]), x[:2]),
    "cumulative": lambda x: (x.cumsum(0), x.cumprod(1), x.cummax(0)),
    "foreach": lambda x: torch._foreach_mul([x, x.sin()], 2.0),
    "losses": lambda x: (
        nn.functional.cross_entropy(x, torch.tensor([0, 1, 2, 0])),
        nn.functional.huber_loss(x, x + 1),
    ),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)
NOT_DIFFERENTIABLE = {"autograd inside", "out="}


@functions
def test_outputs_in_every_run(name):
    call = jax.jit(lambda x: torchleaf.torch_function(FUNCTIONS[name])(x))
    for run in range(RUNS):
        (x,) = twins.normal((4, 3), seed=run)
        expected = jax.tree.map(lambda y: y, FUNCTIONS[name](as_torch(x)))
        assert_same_bits(jax.tree.leaves(call(x)), jax.tree.leaves(from_torch(expected)))


def inexact(tree):
    return [y for y in jax.tree.leaves(tree) if jnp.issubdtype(y.dtype, jnp.inexact)]


@residuals
@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in NOT_DIFFERENTIABLE])
def test_gradients_in_every_run(name, residuals):
    function = torchleaf.torch_function(FUNCTIONS[name], residuals=residuals)

    @jax.jit
    def step(x):
        outs, pullback = jax.vjp(lambda x: inexact(function(x)), x)
        return outs, pullback([y * y for y in outs])[0]

    for run in range(RUNS):
        (x,) = twins.normal((4, 3), seed=run)
        leaf = as_torch(x).requires_grad_()
        outs = [y for y in tree_leaves(FUNCTIONS[name](leaf.clone())) if y.is_floating_point() or y.is_complex()]
        total = [y.detach().to(dtype_of(y)).to(y.dtype).square().conj() for y in outs]
        pairs = [(y, ct) for y, ct in zip(outs, total, strict=True) if y.requires_grad]
        (grad,) = torch.autograd.grad([y for y, _ in pairs], leaf, [ct for _, ct in pairs])
        close(step(x), (from_torch(outs), from_torch(grad)))


def dtype_of(tensor):
    return torch.float32 if tensor.dtype == torch.float64 else tensor.dtype


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64], ids=lambda d: d.__name__)
def test_every_dtype(dtype, x64):
    step = jax.jit(jax.value_and_grad(lambda x: torchleaf.torch_function(lambda x: x.tanh().T @ x)(x)[0, 1]))
    for run in range(RUNS):
        x = twins.normal((4, 3), seed=run)[0].astype(dtype)
        leaf = torchleaf.to_torch(x).clone().requires_grad_()
        y = (leaf.tanh().T @ leaf)[0, 1]
        y.backward()
        assert_same_bits(step(x), from_torch((y, leaf.grad)))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.int64, jnp.uint8, bool], ids=lambda d: d.__name__)
def test_every_integer_dtype(dtype, x64):
    def function(x):
        return x + x, x.sum(), x.bool(), x * 2.5, torch.bitwise_not(x)

    call = jax.jit(torchleaf.torch_function(function))
    for run in range(RUNS):
        x = (10 * twins.normal((4, 3), seed=run)[0]).astype(dtype)
        assert_same_bits(call(x), from_torch(function(as_torch(x))))


@pytest.mark.parametrize("first", [0, 3])
def test_an_output_viewed_as_another_dtype(first):
    """Zeros have the same bits in every dtype, so that the first runs on them tell nothing."""
    call = jax.jit(torchleaf.torch_function(lambda k: (k * 2).view(torch.float16)))
    for run in range(RUNS):
        k = jnp.full(3, first if run < 3 else run, jnp.int16)
        np.testing.assert_array_equal(np.asarray(call(k)).view(np.int16), 2 * np.asarray(k))


def test_an_auxiliary_output_viewed_as_another_dtype():
    function = torchleaf.torch_function(lambda x, k: (x.sin().sum(), (k * 2).view(torch.float16)))
    step = jax.jit(jax.value_and_grad(function, has_aux=True))
    for run in range(RUNS):
        k = jnp.full(3, run, jnp.int16)
        (_, bits), _ = step(X, k)
        np.testing.assert_array_equal(np.asarray(bits).view(np.int16), 2 * np.asarray(k))


# --- transformations ---------------------------------------------------------------------------------


def twice(twin, f):
    """The backward pass twice within one program, and a linear map applied twice."""

    def program(*args):
        y, pullback = jax.vjp(f, *args)
        _, pushforward = jax.linearize(f, *args)
        return pullback(y), pullback(2 * y), pushforward(*args), pushforward(*(3 * x for x in args))

    return program


def scan(twin, f):
    def program(x, *rest):
        return jax.lax.scan(lambda x, scale: (jnp.sin(f(x, *rest)).sum() * scale * x, x), x, jnp.arange(1.0, 4.0))

    return program


def while_loop(twin, f):
    def program(x, *rest):
        return jax.lax.while_loop(lambda x: jnp.abs(x).sum() < 50, lambda x: 2 * x + f(x, *rest).sum() ** 2, x)

    return program


def cond_of_each(twin, f):
    def program(*args):
        return jax.lax.cond(args[0].ravel()[0] > 0, lambda: twins.total(f)(*args), lambda: args[0].sum())

    return jax.vmap(jax.grad(program))


def over_batch(transform):
    return lambda twin, f: jax.vmap(transform(twin, f))


def first_order(twin, f):
    return jax.value_and_grad(twins.total(f), tuple(range(len(twin.shapes))))


def repeated_gradient(twin, f):
    return jax.grad(lambda *args: jnp.square(jax.grad(twins.total(f))(*args)).sum())


TRANSFORMS = {
    "grad": (first_order, False),
    "vmap of grad": (over_batch(first_order), True),
    "vmap of vmap": (lambda twin, f: jax.vmap(jax.vmap(f, (0, *[None] * (len(twin.shapes) - 1)))), "twice"),
    "grad of vmap": (lambda twin, f: jax.grad(lambda *args: jnp.square(jax.vmap(f)(*args)).sum()), True),
    "jacrev": (lambda twin, f: jax.jacrev(f, tuple(range(len(twin.shapes)))), False),
    "jacfwd": (lambda twin, f: jax.jacfwd(f, tuple(range(len(twin.shapes)))), False),
    "vmap of jacrev": (lambda twin, f: jax.vmap(jax.jacrev(f)), True),
    "hessian": (lambda twin, f: jax.hessian(twins.total(f)), False),
    "grad of grad": (repeated_gradient, False),
    "jvp": (lambda twin, f: lambda *args: jax.jvp(f, args, args), False),
    "jvp of grad": (lambda twin, f: lambda *args: jax.jvp(jax.grad(twins.total(f)), args, args), False),
    "vjp and linearize twice": (twice, False),
    "scan": (scan, False),
    "gradient of scan": (lambda twin, f: jax.grad(lambda *args: twins.total(scan(twin, f))(*args)[0]), False),
    "while_loop": (while_loop, False),
    "cond under vmap": (cond_of_each, True),
    "checkpoint": (lambda twin, f: jax.grad(jax.checkpoint(twins.total(f))), False),
}
TWINS = {"layer": twins.LAYER, "attention": twins.ATTENTION, "scalar": twins.SCALAR}


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_in_every_run(name, twin):
    twin, (transform, lead) = TWINS[twin], TRANSFORMS[name]
    if name == "gradient of scan":
        transform = gradient_of_scan
    step, expected = jax.jit(transform(twin, twin.ours)), jax.jit(transform(twin, twin.jax))
    for run in range(5):
        args = twin.arguments(run, (2,) if lead is True else ())
        if lead == "twice":
            args = (twin.arguments(run, (2, 3))[0], *twin.arguments(run, (2,))[1:])
        assert_trees_close(step(*args), expected(*args), rtol=1e-3, atol=1e-4)
    assert live_graphs() <= 10


def gradient_of_scan(twin, f):
    return jax.grad(lambda *args: jnp.sin(scan(twin, f)(*args)[0]).sum())


def test_a_pullback_that_leaves_the_program():
    """Another program uses it, and uses it again."""
    function = torchleaf.torch_function(lambda x: torch.tanh(x) * x)
    forward, backward = jax.jit(lambda x: jax.vjp(function, x)), jax.jit(lambda pullback, y: pullback(y))
    for run in range(RUNS):
        y, pullback = forward(X + run)
        expected = jax.vjp(lambda x: jnp.tanh(x) * x, X + run)[1](y)
        close([backward(pullback, y), backward(pullback, y)], [expected] * 2)
    assert live_graphs() == 0


def test_two_programs_take_other_gradients_of_one_function():
    function = torchleaf.torch_function(lambda x, y: torch.sin(x) * y)
    for_x, for_y = (jax.jit(jax.grad(lambda x, y: function(x, y).sum(), i)) for i in (0, 1))
    for run in range(RUNS):
        x, y = twins.normal((3,), (3,), seed=run)
        close([for_x(x, y), for_y(x, y)], [jnp.cos(x) * y, jnp.sin(x)])


# --- what is around the call -------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("since", [0, 1, 3])
def test_grad_modes_around_some_runs_change_nothing(context, since):
    module, cotangent = MODULES["mlp"][0](), torch.ones(5, 3)
    model, step = torchleaf.TorchModule(module), eqx.filter_jit(pulled_back)
    for run in range(RUNS):
        x = torch.randn(5, 6)
        expected = native(module, x, cotangent, "live")
        with context() if run >= since else contextlib.nullcontext():
            actual = step(model, torchleaf.to_jax(x), torchleaf.to_jax(cotangent))
        assert_same_bits(actual, expected)


def test_grad_mode_stays_as_it_was():
    step = jax.jit(jax.grad(lambda x: torchleaf.torch_function(torch.sin)(x).sum()))
    for grad_mode in (True, False) * 3:
        with torch.set_grad_enabled(grad_mode):
            jax.block_until_ready(step(X))
            assert torch.is_grad_enabled() is grad_mode


def test_autocast_around_some_runs():
    """It is part of the signature, so that each of the two programs is recorded as what it is."""
    function = torchleaf.torch_function(lambda x, w: torch.tanh(x @ w))
    outside, inside = jax.jit(lambda *args: function(*args)), jax.jit(lambda *args: function(*args))
    for run in range(2 * RUNS):
        x, w = twins.normal((4, 3), (3, 5), seed=run)
        with torch.autocast("cpu", torch.bfloat16, enabled=run % 2 == 1):
            expected = from_torch(torch.tanh(as_torch(x) @ as_torch(w)))
            assert expected.dtype == (jnp.bfloat16 if run % 2 else jnp.float32)
            assert_same_bits((inside if run % 2 else outside)(x, w), expected)


def test_autocast_inside():
    def layer(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ w).float()

    function = torchleaf.torch_function(layer)
    step = jax.jit(jax.value_and_grad(lambda x, w: function(x, w).sum(), (0, 1)))
    for run in range(RUNS):
        x, w = twins.normal((4, 3), (3, 5), seed=run)
        leaves = as_torch(x).requires_grad_(), as_torch(w).requires_grad_()
        y = layer(*leaves)
        y.sum().backward()
        value, grads = step(x, w)
        assert_same_bits(grads, from_torch(tuple(leaf.grad for leaf in leaves)))
        close(value, from_torch(y.sum()))


# --- threads and memory ------------------------------------------------------------------------------


def recordings():
    gc.collect()
    return sum(type(x) is Recording for x in gc.get_objects())


@pytest.mark.parametrize("n_threads", [2, 4])
def test_threads_call_one_gradient_from_the_first_run_on(n_threads):
    twin = twins.ATTENTION
    step = jax.jit(first_order(twin, twins.Twin(twin.torch, twin.jax, twin.shapes).ours))
    expected = jax.jit(first_order(twin, twin.jax))

    def work(thread):
        arguments = [twin.arguments(100 * thread + run) for run in range(20)]
        return [(args, step(*args)) for args in arguments]

    with ThreadPoolExecutor(n_threads) as pool:
        for args, result in (pair for pairs in pool.map(work, range(n_threads)) for pair in pairs):
            close(result, expected(*args))
    assert live_graphs() == 0
    assert recordings() == 0


@residuals
def test_recordings_are_freed_once_they_are_code(residuals):
    function = torchleaf.torch_function(lambda x: torch.tanh(x) * x, residuals=residuals)
    step = jax.jit(jax.grad(lambda x: function(x).sum()))
    before = recordings()
    for _ in range(3):
        jax.block_until_ready(step(X))
    assert recordings() == before == 0


# --- the other transport -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_gradients_through_a_callback_have_the_bits_of_torch(name, monkeypatch):
    monkeypatch.setattr(lowering, "_registered_platforms", frozenset)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torchleaf has no XLA FFI target")
        test_gradients_have_the_bits_of_torch_in_every_run(name, "live")
