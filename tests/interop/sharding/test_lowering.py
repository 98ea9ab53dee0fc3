"""What XLA is given: the sharding rule of a call, on a CPU and for GPUs, and what becomes of JAX's persistent cache."""

import pytest
from meshes import run_on_devices as run

pytestmark = pytest.mark.long


def test_the_rule_shares_batches_and_nothing_else():
    """The same for both platforms: one factor for a batch, in operands and results; all other axes are their own."""
    run(
        """
        mesh = mesh_of(data=4)
        params, static = eqx.partition(torchleaf.TorchModule(torch.nn.Linear(4, 3)), eqx.is_array)
        f = jax.jit(lambda p, x: jax.vmap(eqx.combine(p, static))(x))
        traced = f.trace(put(params, mesh), put(x, mesh, "data"))
        for platform in ("cpu", "cuda"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            # a mark, bias, weight, the batch of examples; its axis 0 is the result's
            assert "op_sharding_rule<([], [i], [j, k], [l, m])->([l, n]) {i=3, j=3, k=4, l=16, m=4, n=3}" in text, text
            assert "CustomSPMDPartitioning" in text and "torchleaf_call" not in text
        """,
        4,
    )


def test_the_persistent_cache_gives_no_program_of_another_process(tmp_path):
    script = """
        mesh = mesh_of(data=4)
        params, static = eqx.partition(torchleaf.TorchModule(network), eqx.is_array)
        loss = lambda p, x: jnp.sum(jnp.sin(jax.vmap(eqx.combine(p, static))(x)))
        got = jax.jit(jax.grad(loss))(put(params, mesh), put(x, mesh, "data"))
        assert_close(got, jax.grad(loss)(params, x), 2e-5)
        """
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1",  # the setting under which one would be taken
    }
    for _ in range(2):
        run(script, 4, **cache)
    assert any(tmp_path.iterdir())


def test_where_handles_are_places_the_forward_runs_again():
    """As on GPUs: whether a handle keeps its place is not known before the program is partitioned."""
    run(
        """
        from torchleaf.interop.calls.handles import BY_PLACE

        mesh = mesh_of(data=4)
        params, static = eqx.partition(torchleaf.TorchModule(network), eqx.is_array)
        loss = lambda p, x: jnp.sum(jnp.sin(jax.vmap(eqx.combine(p, static))(x)))
        expected = jax.grad(loss)(params, x)
        BY_PLACE.add("cpu")
        grad = jax.jit(jax.grad(loss))
        assert_close(grad(put(params, mesh), put(x, mesh, "data")), expected, 2e-5)
        assert collectives(jax.grad(loss), put(params, mesh), put(x, mesh, "data")) == {"all-reduce": 1}
        assert residuals.live_graphs() == 0
        """,
        4,
    )
