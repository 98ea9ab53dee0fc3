"""Several processes, each with its own torch, on JAX's runtime: values and gradients as in one process."""

import textwrap

import pytest
from local_processes import run_all, run_processes
from meshes import PRELUDE

pytestmark = pytest.mark.long

SETUP = (
    PRELUDE
    + """
import numpy as np

params, static = eqx.partition(torchleaf.TorchModule(network), eqx.is_array)
one = lambda p, x: eqx.combine(p, static)(x)


def spread(tree, mesh, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    of = lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])
    return jax.tree.map(of, jax.tree.map(np.asarray, tree))


def assert_parts_close(got, expected, tolerance=2e-5):
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    for x, y in zip(got, expected, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        for shard in x.addressable_shards:
            np.testing.assert_allclose(shard.data, np.asarray(y)[shard.index], rtol=tolerance, atol=tolerance)
"""
)


def run(script: str, n: int, devices: int) -> None:
    """With the setup, in `n` processes."""
    run_all(SETUP + textwrap.dedent(script), n, devices)


@pytest.mark.parametrize(("n", "devices"), [(2, 2), (4, 1)])
def test_every_transformation_against_one_process(n, devices):
    run(
        """
        assert jax.process_count() == n and len(jax.local_devices()) < len(jax.devices())
        for kind in ("Auto", "Explicit") if n == 2 else ("Auto",):
            mesh = mesh_of(kind, data=len(jax.devices()))
            everywhere, xs = spread(params, mesh), spread(x, mesh, "data")
            for name, (f, allowed) in transformations(one).items():
                expected = jax.jit(f)(params, x)
                with jax.set_mesh(mesh):
                    assert_parts_close(jax.jit(f)(everywhere, xs), expected)
                    if allowed is not None:
                        assert collectives(f, everywhere, xs) == allowed, name
            whole = lambda p, x: jnp.sum(jnp.sin(one(p, x)))
            loss = jax.shard_map(
                lambda p, x: jax.lax.psum(whole(p, x), "data"), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
            )
            with jax.set_mesh(mesh):
                got = jax.jit(jax.value_and_grad(loss, (0, 1)))(everywhere, xs)
            assert_parts_close(got, jax.value_and_grad(whole, (0, 1))(params, x))
        assert residuals.live_graphs() == 0
        """,
        n,
        devices,
    )


def test_orbax_saves_and_restores_a_sharded_model(tmp_path):
    run(
        f"""
        import orbax.checkpoint as ocp

        mesh = mesh_of(data=len(jax.devices()))
        wide = torchleaf.TorchModule(torch.nn.Linear(4, 8))
        weights, static = eqx.partition(wide, eqx.is_array)
        saved = spread(weights, mesh, "data")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save("{tmp_path}/model", saved.params)
            checkpointer.wait_until_finished()
            like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), saved.params)
            restored = checkpointer.restore("{tmp_path}/model", like)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved.params), strict=True):
            assert a.sharding == b.sharding
        assert_parts_close(restored, weights.params, 0)
        model = eqx.tree_at(lambda m: m.params, wide, restored)
        f = eqx.filter_jit(lambda m, x: jax.vmap(m)(x))
        assert_parts_close(f(model, spread(x, mesh, "data")), jax.vmap(wide)(x))
        """,
        2,
        2,
    )


def test_a_process_that_dies_is_an_error_and_no_hang():
    """Within the time-out that JAX is given, 10 seconds here."""
    script = SETUP + textwrap.dedent(
        """
        import os
        import time

        mesh = mesh_of(data=len(jax.devices()))
        everywhere, xs = spread(params, mesh), spread(x, mesh, "data")
        step = jax.jit(jax.grad(lambda p, x: jnp.sum(jax.vmap(one, (None, 0))(p, x) ** 2)))
        jax.block_until_ready(step(everywhere, xs))
        print("first step done", flush=True)
        if me == 1:
            os._exit(7)
        time.sleep(1)
        jax.block_until_ready(step(everywhere, xs))
        print("second step done", flush=True)
        """
    )
    (survivor, said), (dead, _) = run_processes(script, 2, timeout=120)
    assert dead == 7
    assert "first step done" in said
    assert "second step done" not in said
    assert survivor not in (0, None), said
