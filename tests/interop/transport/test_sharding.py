"""Torch calls inside `jax.shard_map`, on eight devices, in a process of their own."""

from fresh_process import run_python


def test_shard_map_and_its_gradients_against_jax():
    run_python(
        """
        import jax
        import jax.numpy as jnp
        import numpy as np
        import torch
        import torchleaf
        from jax.sharding import AxisType, PartitionSpec as P

        torch.set_num_threads(1)
        mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
        function = torchleaf.torch_function(lambda x, w: torch.tanh(x @ w))
        x = jnp.linspace(-1.0, 1.0, 64).reshape(16, 4)
        w = jnp.linspace(-0.5, 0.5, 12).reshape(4, 3)

        sharded = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i")))
        np.testing.assert_allclose(sharded(x, w), jnp.tanh(x @ w), rtol=1e-5, atol=1e-6)
        grads = jax.grad(lambda x, w: sharded(x, w).sum(), (0, 1))(x, w)
        expected = jax.grad(lambda x, w: jnp.tanh(x @ w).sum(), (0, 1))(x, w)
        for grad, reference in zip(grads, expected, strict=True):
            np.testing.assert_allclose(grad, reference, rtol=1e-5, atol=1e-5)
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
