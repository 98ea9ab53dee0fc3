"""Ops without a kernel for autograd: values are right, and derivatives through them are refused, not zero."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf

LIBRARY = torch.library.Library("torchleaf_tests_lost", "DEF")
LIBRARY.define("triple(Tensor x) -> Tensor")
LIBRARY.impl("triple", lambda x: 3 * x, "CPU")
LIBRARY.impl("triple", torch.empty_like, "Meta")
LIBRARY.define("order(Tensor x) -> Tensor")
LIBRARY.impl("order", torch.argsort, "CPU")
LIBRARY.impl("order", lambda x: torch.empty_like(x, dtype=torch.int64), "Meta")
LIBRARY.define("triple_and_order(Tensor x) -> (Tensor, Tensor)")
LIBRARY.impl("triple_and_order", lambda x: (3 * x, x.argsort()), "CPU")
LIBRARY.impl("triple_and_order", lambda x: (torch.empty_like(x), torch.empty_like(x, dtype=torch.int64)), "Meta")
OPS = torch.ops.torchleaf_tests_lost

X = jnp.asarray([0.3, -0.2, 0.7])
DERIVATIVES = {
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "jitted grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum())),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
    "hessian": lambda f: jax.hessian(lambda x: f(x).sum()),
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(lambda x: f(x).sum()))(x[:, None]),
    "checkpoint": lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum()),
}
LOSING = {
    "alone": lambda x: OPS.triple(x),
    "beside others": lambda x: x.sin() * OPS.triple(x.cos()),
    "the float of two outputs": lambda x: OPS.triple_and_order(x * 1)[0] + x,
    "in code that reads values": lambda x: OPS.triple(x) if x.sum() > 0 else x,
}
engines = pytest.mark.parametrize("engine", ["torch", "xla"])
pytestmark = pytest.mark.filterwarnings(
    "ignore:vmap of .*runs as a loop", "ignore:.*autograd kernel was not registered"
)


@pytest.mark.long
@engines
@pytest.mark.parametrize("name", LOSING)
@pytest.mark.parametrize("transform", DERIVATIVES)
def test_derivatives_through_one_are_refused(name, transform, engine):
    if engine == "xla" and "reads values" in name:
        pytest.skip("refused by this engine in any case")
    f = torchleaf.torch_function(LOSING[name], engine=engine)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"goes through torchleaf_tests_lost::triple.*x\.detach\(\)"):
        jax.block_until_ready(DERIVATIVES[transform](f)(X))


@engines
def test_values_are_right(engine):
    f = torchleaf.torch_function(LOSING["beside others"], engine=engine)
    np.testing.assert_allclose(f(X), 3 * jnp.sin(X) * jnp.cos(X), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(f)(X), 3 * jnp.sin(X) * jnp.cos(X), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(f)(X), 3 * jnp.sin(X) * jnp.cos(X), rtol=1e-6)


def without_gradients(x):
    with torch.no_grad():
        scale = OPS.triple(x)
    return x * scale


KEEPING = {
    "detached": (lambda x: x * OPS.triple(x.detach()), lambda x: x * jax.lax.stop_gradient(3 * x)),
    "without gradients": (without_gradients, lambda x: x * jax.lax.stop_gradient(3 * x)),
    "whole numbers": (lambda x: x[OPS.order(x)] * torch.arange(3.0), lambda x: jnp.sort(x) * jnp.arange(3.0)),
}


@engines
@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("transform", DERIVATIVES)
def test_where_nothing_is_lost_nothing_is_refused(name, transform, engine):
    """The remedies, and ops that give whole numbers."""
    fn, expected = KEEPING[name]
    if transform == "vmap of grad" and name == "whole numbers":
        fn = lambda x: x[OPS.order(x)]  # noqa: E731
        expected = jnp.sort
    ours = DERIVATIVES[transform](torchleaf.torch_function(fn, engine=engine))(X)
    np.testing.assert_allclose(ours, DERIVATIVES[transform](expected)(X), rtol=1e-5, atol=1e-6)


def test_a_weight_that_a_module_uses_so():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, OPS.triple(self.weight), self.bias)

    model = torchleaf.TorchModule(Scaled(3, 2))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no derivative is registered"):
        eqx.filter_grad(lambda model: model(X).sum())(model)
