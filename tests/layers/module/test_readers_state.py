"""Modules that read values: their state is neither lost nor invented, their caches are fresh, JAX's arrays stay."""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from frameworks import EquinoxModel, LinenModel, eager_and_jit, every_framework
from samples import as_torch
from torch import nn
from torchleaf import StateError, TorchModule
from untouched import unchanged

pytestmark = pytest.mark.filterwarnings("ignore:vmap of .*runs as a loop")
AT_RUN_TIME = (RuntimeError, ValueError)
X = jnp.ones(3)
UPDATES = {
    "in place": lambda m, new: m.mean.copy_(new),
    "data": lambda m, new: m.mean.data.copy_(new),
    "set data": lambda m, new: setattr(m.mean, "data", new),
    "assigned": lambda m, new: setattr(m, "mean", new),
    "registered": lambda m, new: m.register_buffer("mean", new),
    "view": lambda m, new: m.mean[1:].copy_(new[1:]),
    "numpy": lambda m, new: m.mean.numpy().__setitem__(slice(None), new.numpy()),
    "child": lambda m, new: m.child.mean.lerp_(new, 0.5),
}
updates = pytest.mark.parametrize("how", UPDATES)


class Ema(nn.Module):
    """A moving average that is updated for positive inputs only."""

    def __init__(self, how, size=3):
        super().__init__()
        self.how, self.w, self.child = how, nn.Parameter(torch.linspace(0.5, 1.5, size)), nn.Module()
        self.register_buffer("mean", torch.linspace(0, 1, size))
        self.child.register_buffer("mean", torch.zeros(size))

    def forward(self, x):
        if bool((x > 0).any()):
            with torch.no_grad():
                UPDATES[self.how](self, self.mean.lerp(x.detach(), 0.5))
        return (x - self.mean - self.child.mean) * self.w


BUFFER = r"changes buffer `(child\.)?mean`"


def gradient_of(model):
    return lambda x: jax.grad(lambda x: model(x).sum())(x)


def scanned(model):
    return lambda x: jax.lax.scan(lambda c, _: (model(c), None), x, None, 2)[0]


KINDS = {
    "eager": lambda model: model,
    "jit": lambda model: jax.jit(lambda x: model(x)),
    "grad": gradient_of,
    "jit grad": lambda model: jax.jit(gradient_of(model)),
    "vmap": lambda model: lambda x: jax.vmap(model)(jnp.stack([x, x]))[0],
    "scan": scanned,
    "jit vmap grad": lambda model: lambda x: jax.jit(jax.vmap(gradient_of(model)))(jnp.stack([x, x]))[0],
}
kinds = pytest.mark.parametrize("kind", KINDS)
shapes = pytest.mark.parametrize("options", [{}, {"out_shape": jax.ShapeDtypeStruct((3,), jnp.float32)}], ids=str)


def in_torch(module, kind, x):
    leaf = as_torch(x).requires_grad_("grad" in kind)
    y = module(module(leaf)) if kind == "scan" else module(leaf)
    return from_torch(torch.autograd.grad(y.sum(), leaf)[0] if "grad" in kind else y)


# --- changes of buffers without a place for them -----------------------------------------------------


@shapes
@kinds
@updates
def test_a_change_of_state_is_refused_when_it_happens_and_only_then(how, kind, options):
    module = Ema(how)
    model = TorchModule(module, **options)
    program = KINDS[kind](model)
    for sign in (-1, 1, -1, 1, -1):
        if sign < 0:
            assert_trees_close(program(-X), in_torch(module, kind, -X))
            continue
        with pytest.raises(AT_RUN_TIME, match=rf"Ema {BUFFER} in its forward pass.*make_with_state"):
            jax.block_until_ready(program(X))
    assert_trees_close(model.buffers["mean"], jnp.linspace(0, 1, 3))


@pytest.mark.parametrize("framework", [EquinoxModel, LinenModel], ids=lambda f: f.name)
@eager_and_jit
@updates
def test_it_is_refused_with_the_remedy_of_each_framework(framework, jit, how):
    model = framework(Ema(how))
    call = model.maybe_jit(lambda m, x: m(x), jit=jit)
    for _ in range(2):
        assert_trees_close(call(-X), from_torch(Ema(how)(as_torch(-X))))
        with pytest.raises(AT_RUN_TIME, match=rf"Ema {BUFFER}.*{framework.state_remedy}"):
            jax.block_until_ready(call(X))


@pytest.mark.parametrize("size", [3, 100_000], ids=["copied", "watched"])
@updates
def test_large_buffers_are_watched_and_small_ones_compared(how, size):
    """What costs less; both find every kind of change."""
    model = TorchModule(Ema(how, size))
    x = jnp.ones(size)
    program = jax.jit(lambda x: model(x))
    with unchanged(model, x):
        for _ in range(3):
            assert_trees_close(program(-x), from_torch(Ema(how, size)(as_torch(-x))))
            with pytest.raises(AT_RUN_TIME, match=BUFFER):
                jax.block_until_ready(program(x))


# --- changes of buffers that have a place --------------------------------------------------------------


@every_framework
@eager_and_jit
@updates
def test_state_is_torchs_step_by_step(framework, jit, how):
    module = Ema(how)
    model = framework(copy.deepcopy(module), with_state=True)
    call = model.maybe_jit(lambda m, x: m(x), jit=jit)
    for factor in (1, -1, 2, -2, 3):
        assert_trees_close(call(X * factor), from_torch(module(as_torch(X * factor))))
        assert_trees_close(model.weights.buffers, {n: from_torch(b) for n, b in module.named_buffers()})


@every_framework
@updates
def test_state_comes_out_of_a_differentiated_call(framework, how):
    module = Ema(how)
    model = framework(copy.deepcopy(module), with_state=True)
    for factor in (-1, 1, 2):
        x = as_torch(X * factor).requires_grad_()
        (module(x) ** 2).sum().backward()
        found = model.gradients(lambda m, x: ((m(x) ** 2).sum(), None), X * factor)
        assert_trees_close(found.inputs, [from_torch(x.grad)])
        assert_trees_close(model.weights.buffers, {n: from_torch(b) for n, b in module.named_buffers()})


@updates
def test_state_that_a_scan_carries(how):
    module = Ema(how)
    model, state = eqx.nn.make_with_state(TorchModule)(copy.deepcopy(module))
    xs = jnp.stack([X * f for f in (1, -1, 2, -3, 4)])
    state, ys = jax.lax.scan(lambda s, x: model(x, state=s)[::-1], state, xs)
    assert_trees_close(ys, jnp.stack([from_torch(module(as_torch(x))) for x in xs]))
    expected = {n: from_torch(b) for n, b in module.named_buffers()}
    assert_trees_close(state.get(model.buffer_index), expected)


class ChangesRarely(nn.Module):
    """Changes a buffer for values that no example has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if x.max() > 1e6:
            self.count += 1
        return x + self.count


@every_framework
def test_state_that_changes_for_rare_values_is_known_from_then_on(framework):
    module = ChangesRarely()
    model = framework(copy.deepcopy(module), with_state=True)
    assert_trees_close(model(X), X)
    with pytest.raises(AT_RUN_TIME, match=r"ChangesRarely changes buffer `count` for these values.*Call it again"):
        jax.block_until_ready(model(X * 1e7))
    for factor in (1e7, 1, 1e7):
        assert_trees_close(model(X * factor), from_torch(module(as_torch(X * factor))))
    assert_trees_close(model.weights.buffers, {"count": jnp.float32(2)})


def test_the_same_in_a_compiled_program():
    module = ChangesRarely()
    model, state = eqx.nn.make_with_state(TorchModule)(module)
    model.module.stand_alone()  # of another one, built alike, the change is known already
    step = eqx.filter_jit(lambda model, x, state: model(x, state=state))
    step(model, X, state)
    with pytest.raises(AT_RUN_TIME, match=r"jax\.clear_caches"):
        jax.block_until_ready(step(model, X * 1e7, state))
    jax.clear_caches()
    y, state = step(model, X * 1e7, state)
    assert_trees_close((y, state.get(model.buffer_index)["count"]), (X * 1e7 + 1, jnp.float32(1)))


# --- no state is invented ------------------------------------------------------------------------------


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("limit", torch.tensor(0.5))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return x.clamp(max=self.limit) if (x > 0).any() else x


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3).eval()

    def forward(self, x):
        return self.norm(x[None])[0] * float(self.norm.weight.detach().sum())


def _moved(how):
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shifts", torch.arange(3.0))

        def forward(self, x):
            assert x.isfinite().all()
            self.shifts = how(self.shifts)
            return x + self.shifts

    return Moved


MOVES = {
    "to its device": lambda t: t.to(t.device),
    "to its dtype": lambda t: t.float(),
    "contiguous": lambda t: t.contiguous(),
    "detached": lambda t: t.detach(),
    "viewed": lambda t: t.view_as(t),
    "cloned": lambda t: t.clone(),
    "copied": lambda t: t.to(t.dtype, copy=True),
}
STEADY = {"clip": Clip, "normalised": Normalised, **{name: _moved(how) for name, how in MOVES.items()}}


@every_framework
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("name", STEADY)
def test_vmap_of_a_module_whose_buffers_stay_as_they_are(framework, with_state, name):
    module = STEADY[name]().eval()
    model = framework(copy.deepcopy(module), with_state=with_state)
    xs = jnp.stack([X, -X, 2 * X])
    expected = jnp.stack([from_torch(module(as_torch(x))) for x in xs])
    buffers = model.weights.buffers
    assert_trees_close(model.vmap(lambda m, x: m(x))(xs), expected)
    assert_trees_close(model(xs[0]), expected[0])
    assert_trees_close(model.weights.buffers, buffers)


@eager_and_jit
@pytest.mark.parametrize("how", MOVES)
def test_a_buffer_in_whose_place_its_own_value_is_put(how, jit):
    """Also in modules that read no values, and in programs that replay them."""

    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shifts", torch.arange(3.0))

        def forward(self, x):
            self.shifts = MOVES[how](self.shifts)
            return x + self.shifts

    model = TorchModule(Moved())
    call = jax.jit(lambda x: model(x)) if jit else model
    for run in range(5):
        assert_trees_close(call(X + run), X + run + jnp.arange(3.0))
    assert_trees_close(jax.vmap(model)(X[None])[0], X + jnp.arange(3.0))
    assert_trees_close(jax.grad(lambda x: model(x).sum())(X), X)


def test_a_copy_that_is_written_is_another_value():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shifts", torch.arange(3.0))

        def forward(self, x):
            self.shifts = self.shifts.clone()
            self.shifts += 1
            return x + self.shifts

    with pytest.raises(StateError, match="Shifted changes buffer `shifts`"):
        TorchModule(Shifted())(X)


# --- attributes ----------------------------------------------------------------------------------------


class Box:
    def __init__(self):
        self.content, self.table = None, {}


class Keeper(nn.Module):
    """Keeps in an attribute what it computes of its weight."""

    def __init__(self, keep):
        super().__init__()
        self.w, self._keep = nn.Parameter(torch.zeros(())), keep
        self.cache, self.nested, self.box, self.slot, self.boxes = {}, {"a": {}}, Box(), None, [Box()]

    def forward(self, x):
        assert not x.isnan().any()
        return x * self._keep(self, lambda: self.w.exp())


def _dict(m, make):
    if "exp" not in m.cache:
        m.cache["exp"] = make()
    return m.cache["exp"]


def _nested(m, make):
    return m.nested["a"].setdefault("exp", make())


def _slot(m, make):
    if m.slot is None:
        m.slot = make()
    return m.slot


def _new(m, make):
    if not hasattr(m, "made"):
        m.made = make()
    return m.made


def _new_dict(m, make):
    if not hasattr(m, "_memo"):
        m._memo = {}
    return m._memo.setdefault(("exp", b""), make())


def _object_dict(m, make):
    return m.boxes[0].table.setdefault("exp", make())


CACHES = [_dict, _nested, _slot, _new, _new_dict, _object_dict]


@shapes
@pytest.mark.parametrize("keep", CACHES)
def test_caches_are_fresh_in_every_call(keep, options):
    model = TorchModule(Keeper(keep), **options)

    def call(w, x):
        return eqx.tree_at(lambda m: m.params["w"], model, w)(x)

    for w in (0.0, 1.0, 0.5):
        w = jnp.array(w)
        assert_trees_close(call(w, X), jnp.exp(w) * X)
        assert_trees_close(jax.jit(call)(w, X), jnp.exp(w) * X)
        assert_trees_close(jax.grad(lambda w: call(w, X).sum())(w), 3 * jnp.exp(w), rtol=1e-5)
    program = jax.jit(call)
    for run in range(5):
        assert_trees_close(program(jnp.float32(run), X), jnp.exp(jnp.float32(run)) * X, rtol=1e-5)


class Remembers(nn.Module):
    def __init__(self, change):
        super().__init__()
        self._change, self.n, self.hidden, self.history, self.stats = change, 0, torch.zeros(3), [], {"n": 0}
        self.box = Box()
        self.box.content = torch.zeros(3)

    def forward(self, x):
        if bool((x > 0).any()):
            self._change(self, x)
        return x


CHANGES = {
    "n": lambda m, x: setattr(m, "n", m.n + 1),
    "hidden": lambda m, x: m.hidden.add_(1),
    "hidden assigned": lambda m, x: setattr(m, "hidden", m.hidden + 1),
    "history": lambda m, x: m.history.append(x.clone()),
    "stats": lambda m, x: m.stats.update(n=m.stats["n"] + 1),
    "box.content": lambda m, x: m.box.content.mul_(2),
    "box.content assigned": lambda m, x: setattr(m.box, "content", x * 2),
}


@every_framework
@eager_and_jit
@pytest.mark.parametrize("first", [1, -1])
@pytest.mark.parametrize("change", CHANGES)
def test_attributes_that_are_state_are_refused_by_name(framework, jit, change, first):
    """In the trace, if the first arguments lead there, or else in the run that does."""
    model = framework(Remembers(CHANGES[change]), with_state=True)
    call = model.maybe_jit(lambda m, x: m(x), jit=jit)
    name = change.removesuffix(" assigned")
    for sign in (first, -1, 1, 1):
        if sign < 0 and first < 0:
            assert_trees_close(call(-X), -X)
        elif sign > 0:
            with pytest.raises(AT_RUN_TIME, match=rf"Remembers changes attribute `{name}`.*Make it a buffer"):
                jax.block_until_ready(call(X))


# --- JAX's arrays ----------------------------------------------------------------------------------------


class Writes(nn.Module):
    """Writes into its argument or its parameter, for values that no trace has seen."""

    def __init__(self, write, size):
        super().__init__()
        self.w, self._write = nn.Parameter(torch.linspace(0, 1, size)), write

    def forward(self, x):
        if x.max() > 100:
            self._write(self, x)
        return x * self.w


def _through_numpy(m, x):
    m.w.detach().numpy()[0] = 7


def _by_data(m, x):
    m.w.data.clamp_(max=0.5)


def _no_grad(m, x):
    with torch.no_grad():
        m.w.mul_(2)


WRITES = {
    "argument": lambda m, x: x.detach().mul_(2),
    "view of argument": lambda m, x: x.detach()[1:].zero_(),
    "data": _by_data,
    "no_grad": _no_grad,
    "numpy": _through_numpy,
    "set data": lambda m, x: setattr(m.w, "data", m.w.data * 3),
}


@pytest.mark.parametrize("size", [4, 100_000], ids=["copied", "watched"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ["eager", "jit", "grad", "jit grad", "vmap"])
def test_writes_that_no_trace_has_seen_stay_inside_the_call(write, size, kind):
    module = Writes(WRITES[write], size)
    model = TorchModule(module)
    program, x = KINDS[kind](model), jnp.linspace(-1, 1, size)
    for factor in (1, 300, 2, 400):
        argument = x * factor
        with unchanged(model, argument, torch_module=module):
            result = jax.block_until_ready(program(argument))
        assert_trees_close(result, in_torch(copy.deepcopy(module), kind, argument), rtol=1e-5)


def test_a_captured_tensor_is_written_in_no_run():
    total = torch.zeros(3)

    def function(x):
        if x.max() > 0:
            total.add_(1)
        return x

    wrapped = torchleaf.torch_function(function)
    for _ in range(2):
        with pytest.raises(StateError, match="captured"):
            wrapped(X)
    assert torch.equal(total, torch.zeros(3))


# --- false escapes -----------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.rnn = make()

    def forward(self, x):
        assert not x.isnan().any()
        return self.rnn(x)[0].sum()


@pytest.mark.long
@shapes
@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 4), lambda: nn.GRU(3, 4, num_layers=2), lambda: nn.RNN(3, 4)])
def test_second_derivatives_of_recurrent_layers_keep_nothing(make, options):
    options = {k: jax.ShapeDtypeStruct((), jnp.float32) for k in options}
    module = Tagger(make)
    model, x = TorchModule(module, **options), jnp.linspace(-1, 1, 30).reshape(5, 2, 3)

    def loss(params):
        return eqx.tree_at(lambda m: m.params, model, params)(x)

    for wrap in (lambda f: f, jax.jit):
        product = wrap(lambda p: jax.jvp(jax.grad(loss), (p,), (p,))[1])(model.params)
        params = list(module.parameters())
        grads = torch.autograd.grad(module(as_torch(x)), params, create_graph=True)
        total = sum((g * p.detach()).sum() for g, p in zip(grads, params, strict=True))
        expected = torch.autograd.grad(total, params)
        names = [name for name, _ in module.named_parameters()]
        assert_trees_close(product, dict(zip(names, map(from_torch, expected), strict=True)), rtol=1e-3, atol=1e-5)


KEPT: list[torch.Tensor] = []


@pytest.mark.long
@pytest.mark.parametrize("declared", [False, True])
def test_what_really_stays_behind_is_refused(declared):
    """A tensor that a global keeps, in the trace and in a run that no trace has seen."""

    class Leaks(nn.Module):
        def forward(self, x):
            if x.max() > 10:
                KEPT.append(x)
            return x * 2

    x = jnp.ones(100_000)  # which is not copied for every run
    options = {"out_shape": jax.ShapeDtypeStruct(x.shape, x.dtype)} if declared else {}
    model = TorchModule(Leaks(), **options)
    assert_trees_close(model(x), 2 * x)
    with pytest.raises(AT_RUN_TIME, match=r"Leaks keeps argument x .*`tensor\.clone\(\)`"):
        jax.block_until_ready(model(20 * x))
    KEPT.clear()
    with pytest.raises(AT_RUN_TIME, match=r"Leaks keeps argument x .*`tensor\.clone\(\)`"):
        jax.block_until_ready(TorchModule(Leaks(), **options)(20 * x))
    KEPT.clear()
