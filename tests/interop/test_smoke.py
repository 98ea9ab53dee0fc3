import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchleaf


def test_linear(rng):
    linear = torch.nn.Linear(3, 4)
    model = torchleaf.TorchModule(linear)
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    grads = eqx.filter_jit(eqx.filter_grad(lambda m, x: jax.vmap(m)(x).sum()))(model, x)
    linear(torchleaf.to_torch(x)).sum().backward()
    np.testing.assert_allclose(grads.params["weight"], linear.weight.grad, rtol=1e-5)
