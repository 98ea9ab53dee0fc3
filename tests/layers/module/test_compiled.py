"""`torch.compile` inside torchleaf: compiled once per shape and mode, forward and backward, and right everywhere."""

from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

# torch's compiler uses what torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Backend:
    """A compiler that counts its graphs and how often each kind runs."""

    def __init__(self):
        self.compiled, self.ran = Counter(), Counter()

    def __call__(self, graph, example_inputs):
        return aot_autograd(fw_compiler=self._compiler("forward"), bw_compiler=self._compiler("backward"))(
            graph, example_inputs
        )

    def _compiler(self, kind):
        def compile_graph(graph, example_inputs):
            self.compiled[kind] += 1

            def run(*args):
                self.ran[kind] += 1
                return graph(*args)

            return make_boxed_func(run)

        return compile_graph


@pytest.fixture
def backend():
    torch.compiler.reset()
    yield Backend()
    torch.compiler.reset()


@pytest.fixture
def torch_module():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def models(torch_module, backend):
    """The compiled module's model and the plain one's."""
    return torchleaf.TorchModule(torch.compile(torch_module, backend=backend)), torchleaf.TorchModule(torch_module)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)


def _loss(model, x):
    return (model(x) ** 2).sum()


_value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(_loss))


def _leaves(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def test_forward_and_backward_are_compiled_once_per_shape(models, x, backend):
    compiled, plain = models
    for _ in range(3):
        value, grads = _value_and_grad(compiled, x)
    assert backend.compiled == {"forward": 1, "backward": 1}
    assert backend.ran == {"forward": 3, "backward": 3}
    expected_value, expected_grads = _value_and_grad(plain, x)
    assert_trees_close(value, expected_value)
    assert_trees_close(_leaves(grads), _leaves(expected_grads))

    _value_and_grad(compiled, jnp.concatenate([x, x]))
    _value_and_grad(compiled, x)
    assert backend.compiled == {"forward": 2, "backward": 2}


def test_inference_is_compiled_once(models, x, backend):
    compiled, plain = models
    jitted = eqx.filter_jit(compiled)
    for _ in range(3):
        assert_trees_close(jitted(x), plain(x))
    assert_trees_close(compiled(x), plain(x))
    assert backend.compiled == {"forward": 1}
    assert backend.ran == {"forward": 4}


@pytest.mark.parametrize("residuals", ["live", "recompute"])
def test_eager_gradients(torch_module, backend, x, residuals):
    compiled = torchleaf.TorchModule(torch.compile(torch_module, backend=backend), residuals=residuals)
    plain = torchleaf.TorchModule(torch_module)
    assert_trees_close(_leaves(eqx.filter_grad(_loss)(compiled, x)), _leaves(eqx.filter_grad(_loss)(plain, x)))
    assert backend.ran["backward"] == 1


TRANSFORMS = {
    "vmap": lambda model, x: jax.vmap(model)(x),
    "grad of vmap": lambda model, x: _leaves(eqx.filter_grad(lambda m: jax.vmap(m)(x).sum())(model)),
    "vmap of grad": lambda model, x: jax.vmap(lambda x: jax.grad(lambda x: _loss(model, x))(x))(x),
    "jvp": lambda model, x: jax.jvp(model, (x,), (x,)),
    "hessian": lambda model, x: jax.hessian(lambda x: _loss(model, x))(x[0]),
    "scan": lambda model, x: jax.lax.scan(lambda c, x: (c + model(x), None), jnp.zeros(3), x)[0],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_every_transform_works(models, x, transform, jit):
    """Compiled code has first-order reverse mode only; torch's own code takes over elsewhere."""
    compiled, plain = models
    function = eqx.filter_jit(TRANSFORMS[transform]) if jit else TRANSFORMS[transform]
    assert_trees_close(function(compiled, x), TRANSFORMS[transform](plain, x))


def test_a_natively_batched_vmap_runs_compiled(torch_module, backend, x):
    model = torchleaf.TorchModule(torch.compile(torch_module, backend=backend), vmap_method="batched")
    assert_trees_close(jax.jit(jax.vmap(lambda x: model(x)))(x), torchleaf.TorchModule(torch_module)(x))
    assert backend.ran == {"forward": 1}


def test_names_and_the_way_back_are_torchs_own(torch_module, models):
    compiled, _ = models
    expected = torch.compile(torch_module).state_dict()
    state = torchleaf.state_dict(compiled)
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    x = torch.randn(2, 6)
    assert torch.equal(torchleaf.to_torch_module(compiled)(x), torch_module(x))


def test_compiled_function(backend, x):
    @torchleaf.torch_function
    @torch.compile(backend=backend)
    def scaled(a, b):
        return (a * b).sin()

    grad = jax.jit(jax.grad(lambda a: scaled(a, a).sum()))
    for _ in range(2):
        np.testing.assert_allclose(grad(x), 2 * x * jnp.cos(x * x), rtol=1e-5, atol=1e-6)
    assert backend.compiled == {"forward": 1, "backward": 1}
    np.testing.assert_allclose(jax.vmap(scaled)(x, x), jnp.sin(x * x), rtol=1e-5, atol=1e-6)


def test_compilation_in_place_is_lost_with_a_warning(torch_module, backend):
    torch_module[0].compile(backend=backend)
    with pytest.warns(UserWarning, match=r"Sequential .* compiled in place .*`torch\.compile\(module\)`"):
        torchleaf.TorchModule(torch_module)
