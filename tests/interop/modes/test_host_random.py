"""Random numbers of Python and NumPy come from the key, as torch's do: the same in every run, and none without one."""

import contextlib
import cProfile
import random
import sys
import threading

import beartype
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close
from frameworks import every_framework
from fresh_process import run_python
from torch import nn
from torchleaf import RandomnessError, StateError, TorchCallError, torch_function

pytestmark = pytest.mark.filterwarnings("ignore:vmap of .*runs as a loop")
X = jnp.linspace(-1, 1, 6).reshape(2, 3)
KEYS = jax.random.split(jax.random.key(0), 8)


def coin(x):
    """Two paths, as layer dropout takes them."""
    return x.sin() if random.random() < 0.5 else x * 2


def noise(x):
    return x + float(np.random.normal())


def both(x):
    return x * random.gauss(1, 0.1) + torch.from_numpy(np.random.uniform(size=tuple(x.shape)).astype(np.float32))


def with_torch(x):
    return x * random.random() + torch.rand_like(x)


def shuffled(x):
    order = list(range(x.shape[0]))
    random.shuffle(order)
    return x[order] * np.random.randint(1, 9)


def reading_values(x):
    y = x.cos() if random.random() < 0.5 else x.exp()
    return y * y.abs().max().item()


def writing(x):
    if random.random() < 0.5:
        x += 1
    return x * 2


DRAWING = {f.__name__: f for f in (coin, noise, both, with_torch, shuffled, reading_values, writing)}
drawing = pytest.mark.parametrize("name", DRAWING)


@pytest.fixture(autouse=True)
def _generators_stay():
    before = np.random.get_state()
    yield
    assert all(map(np.array_equal, np.random.get_state(), before))


def distinct(results):
    return len({np.asarray(y).tobytes() for y in results})


@pytest.mark.long
@drawing
@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_one_key_gives_one_result_in_every_way(name, residuals):
    function = torch_function(DRAWING[name], residuals=residuals)

    def value_and_gradient(x, key):
        y, pullback = jax.vjp(lambda x: function(x, key=key), x)
        return y, pullback(jnp.ones_like(y))[0]

    eager = [function(X, key=key) for key in KEYS]
    compiled = jax.jit(function)
    assert distinct(eager) > 1
    for _ in range(3):
        assert_trees_close([compiled(X, key=key) for key in KEYS], eager)
    batch = jax.vmap(lambda key: function(X, key=key))(KEYS)
    assert_trees_close(list(batch), eager)
    _, scanned = jax.lax.scan(lambda c, key: (c, function(X, key=key)), 0, KEYS)
    assert_trees_close(list(scanned), eager)
    step = jax.jit(value_and_gradient)
    for key, expected in zip(KEYS, eager, strict=True):
        y, grad = value_and_gradient(X, key)
        assert_trees_close(y, expected)
        assert_trees_close(step(X, key), (y, grad))
        tangent = jax.jvp(lambda x, key=key: function(x, key=key), (X,), (jnp.ones_like(X),))[1]
        assert_trees_close(tangent.sum(), grad.sum(), rtol=1e-4)


@drawing
def test_no_key_is_an_error_that_names_the_generator(name):
    generators = {"noise": r"numpy\.random", "both": r"Python's random and numpy\.random"}
    expected = generators.get(name, r"Python's random")
    if name in ("with_torch", "shuffled"):
        expected = r"aten\.rand|Python's random"
    for transform in (lambda f: f, jax.jit):
        with pytest.raises(RandomnessError, match=rf"{name} draws random numbers \(.*({expected}).*`key=`"):
            transform(torch_function(DRAWING[name]))(X)


def test_the_global_generators_decide_nothing():
    function = jax.jit(torch_function(both))
    results = []
    for seed in range(4):
        with _seeded(seed):
            results.append(function(X, key=KEYS[0]))
    assert distinct(results) == 1


class _seeded:
    def __init__(self, seed):
        self._seed = seed

    def __enter__(self):
        self._before = random.getstate(), np.random.get_state()
        random.seed(self._seed)
        np.random.seed(self._seed)

    def __exit__(self, *exc):
        random.setstate(self._before[0])
        np.random.set_state(self._before[1])


@pytest.mark.long
def test_python_and_numpy_draw_different_numbers():
    def pair(x):
        return x * random.random(), x * np.random.random()

    for key in KEYS:
        a, b = torch_function(pair)(jnp.ones(()), key=key)
        assert a != b


def test_out_shape_changes_nothing():
    function = torch_function(coin, out_shape=jax.ShapeDtypeStruct(X.shape, X.dtype))
    with pytest.raises(RandomnessError, match="Python's random"):
        function(X)
    assert_trees_close(function(X, key=KEYS[0]), torch_function(coin)(X, key=KEYS[0]))


def test_shapes_that_depend_on_random_numbers():
    def grows(x):
        return x.repeat(random.randint(1, 50), 1)

    with pytest.raises(
        TorchCallError, match=r"(?s)grows returns other shapes for other numbers of Python's random.*out_shape"
    ):
        jax.jit(torch_function(grows))(X, key=KEYS[0])


@pytest.mark.long
def test_another_thread_that_draws_is_no_draw_of_the_function():
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            random.Random.random(random._inst)
            np.random.random()

    before = random.getstate(), np.random.get_state()
    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for n in range(10):
            x = jnp.ones((n + 1, 3))
            assert_trees_close(torch_function(torch.sin)(x), jnp.sin(x))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        random.setstate(before[0])
        np.random.set_state(before[1])


@pytest.mark.long
def test_pythons_generator_stays_as_it_is():
    """Neither a trace nor a run moves it, and who puts it back draws nothing."""
    script = """
        import random, jax, jax.numpy as jnp, torch, torchleaf
        function = torchleaf.torch_function(lambda x: x * random.random())
        before = random.getstate()
        y = jax.block_until_ready(jax.jit(function)(jnp.ones(3), key=jax.random.key(0)))
        assert random.getstate() == before
        assert jnp.array_equal(y, function(jnp.ones(3), key=jax.random.key(0)))
        assert random.getstate() == before

        def polite(x):
            state = random.getstate()
            random.seed(0)
            y = x * random.random()
            random.setstate(state)
            return y

        assert torchleaf.torch_function(polite)(jnp.ones(())) == jnp.float32(random.Random(0).random())
        """
    run_python(script)


@pytest.mark.parametrize("profiled", [False, True], ids=["", "under a profiler"])
def test_a_type_checker_draws_nothing_for_the_function(profiled):
    """beartype looks at a random item of a list, which no result depends on."""

    class Other:
        """For a type that has not been checked before: beartype keeps the code for those."""

    @beartype.beartype
    def checked(rows: list[torch.Tensor | Other]) -> torch.Tensor:
        return torch.stack(rows).sum(0)

    before = random.getstate()
    with cProfile.Profile() if profiled else contextlib.nullcontext():
        assert_trees_close(torch_function(lambda x: checked([x, x * 2]))(X), 3 * X)
        assert random.getstate() != before
        with pytest.raises(RandomnessError, match="Python's random"):
            torch_function(lambda x: checked([x, x * random.random()]))(X)
        assert (sys.getprofile() is not None) == profiled or sys.version_info >= (3, 12)


# --- torch.Generator objects ---------------------------------------------------------------------------


def test_a_generator_that_the_callable_holds_is_passed_over():
    """Its numbers are the key's, and it stays as it is."""
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    function = torch_function(lambda x: x + torch.rand(3, generator=generator))
    results = [function(X, key=key) for key in KEYS]
    assert distinct(results) == len(KEYS)
    compiled = jax.jit(function)
    assert_trees_close([compiled(X, key=key) for key in KEYS], results)
    with pytest.raises(RandomnessError, match=r"aten\.rand\.generator"):
        function(X)
    assert torch.equal(generator.get_state(), before)


# --- modules -------------------------------------------------------------------------------------------


class LayerDrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        for layer in self.layers:
            if self.training and random.random() < 0.5:
                continue
            x = x + layer(x)
        return self.norm(x) if random.random() < 0.5 else x


@pytest.mark.long
@every_framework
def test_layers_dropped_at_random(framework):
    """In every framework: with a key, with state that only some of the paths change, and never frozen."""
    module = LayerDrop().train()
    model = framework(module, with_state=True)
    compiled = model.jit(lambda m, x, key: m(x, key=key))
    buffers = model.weights.buffers
    eager, jitted = [], []
    for key in [*KEYS, *KEYS]:
        eager.append(model.replaced(buffers)(X, key=key))
        jitted.append(model.replaced(buffers).jit(lambda m, x, key: m(x, key=key))(X, key))
    assert_trees_close(jitted, eager)
    assert distinct(eager) > 4
    for key in KEYS:
        compiled(X, key)
    assert int(model.weights.buffers["norm.num_batches_tracked"]) > 0
    still = model.in_mode(training=False)
    with pytest.raises(
        RandomnessError, match=rf"LayerDrop draws random numbers \(Python's random\).*{framework.key_remedy}"
    ):
        framework(LayerDrop().train())(X)
    assert still(X, key=KEYS[0]).shape == X.shape


@pytest.mark.long
def test_gradients_of_layers_dropped_at_random_are_of_the_path_taken():
    module = LayerDrop().train()
    for residuals in ("live", "recompute"):
        model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module, residuals=residuals)

        def loss(params, key, model=model, state=state):
            state = jax.tree.map(lambda x: x, state)  # Equinox wants to be told that a state is used twice
            return eqx.tree_at(lambda m: m.params, model, params)(X, key=key, state=state)[0].sum()

        step = jax.jit(jax.value_and_grad(loss))
        for key in KEYS:
            value, grads = step(model.params, key)
            tangent = jax.tree.map(jnp.ones_like, model.params)
            ahead = jax.tree.map(lambda p, t: p + 1e-2 * t, model.params, tangent)
            back = jax.tree.map(lambda p, t: p - 1e-2 * t, model.params, tangent)
            difference = (loss(ahead, key) - loss(back, key)) / 2e-2
            total = sum(g.sum() for g in jax.tree.leaves(grads))
            assert_trees_close(total, difference, rtol=2e-2, atol=2e-2)
            assert_trees_close(value, loss(model.params, key), rtol=1e-5)


OWN = {
    "Python": (lambda: random.Random(0), lambda g: g.random()),
    "NumPy": (lambda: np.random.default_rng(0), lambda g: g.random()),
    "NumPy's old": (lambda: np.random.RandomState(0), lambda g: g.rand()),
}


@pytest.mark.parametrize("name", OWN)
def test_a_generator_that_a_module_holds_is_state(name):
    """No key drives it, and in a program that is replayed it would be frozen: refused by name."""
    make, draw = OWN[name]

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.rng = make()

        def forward(self, x):
            return x if draw(self.rng) < 0.5 else x * 2

    for transform in (lambda f: f, jax.jit):
        model = torchleaf.TorchModule(Noisy())
        with pytest.raises(StateError, match=r"Noisy changes attribute `rng`"):
            transform(lambda x, model=model: model(x))(X)
