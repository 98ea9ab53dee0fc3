"""Data parallel under `jit` with automatic axes: values as on one device, no collective but one sum of gradients."""

import pytest
from meshes import run_on_devices as run

pytestmark = pytest.mark.long


@pytest.mark.parametrize("method", ["auto", "batched", "loop"])
@pytest.mark.parametrize("n", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_transformation_against_one_device(n, method):
    run(
        f"""
        params, static = eqx.partition(torchleaf.TorchModule(network, vmap_method="{method}"), eqx.is_array)
        mesh = mesh_of(data={n})
        xs, everywhere = put(x, mesh, "data"), put(params, mesh)

        def one(params, x):
            return eqx.combine(params, static)(x)

        for name, (f, allowed) in transformations(one).items():
            got, expected = jax.jit(f)(everywhere, xs), jax.jit(f)(params, x)
            assert_close(got, expected, 2e-5)
            assert_close(f(everywhere, xs), expected, 2e-5)
            found = collectives(f, everywhere, xs)
            assert found == allowed if allowed is not None else {{*found}} == {{"all-reduce"}}, (name, found)
        assert residuals.live_graphs() == 0
        """,
        n,
    )


def test_several_mesh_axes_and_nested_batches():
    run(
        """
        mesh = mesh_of(a=2, b=4)
        params, static = eqx.partition(torchleaf.TorchModule(network), eqx.is_array)
        one = lambda p, x: eqx.combine(p, static)(x)
        loss = lambda p, x: jnp.sum(jnp.sin(jax.vmap(one, (None, 0))(p, x)))
        nested = lambda p, x: jnp.sum(jnp.sin(jax.vmap(jax.vmap(one, (None, 0)), (None, 0))(p, x)))
        y = jax.random.normal(jax.random.key(1), (4, 8, 4))
        everywhere = put(params, mesh)
        for f, z, spec, size in [
            (loss, x, [("a", "b")], 8),
            (loss, x, [("b", "a")], 8),
            (loss, x, ["b"], 4),
            (nested, y, ["a"], 2),
            (nested, y, [None, "b"], 4),
            (nested, y, ["a", "b"], 8),
            (nested, y, ["b", "a"], 8),
        ]:
            zs = put(z, mesh, *spec)
            assert_close(jax.jit(jax.grad(f, (0, 1)))(everywhere, zs), jax.grad(f, (0, 1))(params, z), 2e-5)
            assert collectives(jax.grad(f), everywhere, zs) == {"all-reduce": 1}, spec
            grad = jax.jit(jax.grad(f, 1))(everywhere, zs)
            assert grad.sharding.is_equivalent_to(zs.sharding, z.ndim), (grad.sharding, spec)
        forward = lambda p, x: jax.vmap(jax.vmap(one, (None, 0)), (None, 0))(p, x)
        assert collectives(forward, everywhere, put(y, mesh, "a", "b")) == {}
        assert residuals.live_graphs() == 0
        """
    )


def test_ensembles_across_devices():
    """Stacked weights: every device has and computes its own members, and nothing is communicated."""
    run(
        """
        mesh = mesh_of(members=8)
        models = []
        for _ in range(8):
            network.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
            models.append(torchleaf.TorchModule(network, copy=True))
        ensemble = torchleaf.stack(models)
        params, static = eqx.partition(ensemble, eqx.is_array)

        def loss(params, x):
            y = eqx.filter_vmap(lambda m, x: jax.vmap(m)(x), in_axes=(eqx.if_array(0), None))(
                eqx.combine(params, static), x
            )
            return jnp.sum(y**2, (1, 2))

        def losses(params, x):
            return jnp.sum(loss(params, x))

        spread, xs = put(params, mesh, "members"), put(x, mesh)
        assert_close(jax.jit(loss)(spread, xs), jnp.stack([jnp.sum(jax.vmap(m)(x) ** 2) for m in models]), 1e-4)
        assert_close(jax.jit(jax.grad(losses))(spread, xs), jax.grad(losses)(params, x), 1e-4)
        assert collectives(loss, spread, xs) == {}
        assert collectives(jax.grad(losses), spread, xs) == {}
        for grad in jax.tree.leaves(jax.grad(losses)(spread, xs)):
            assert grad.sharding.is_equivalent_to(NamedSharding(mesh, P("members")), grad.ndim)
        assert residuals.live_graphs() == 0
        """
    )


def test_sizes_that_the_devices_do_not_divide():
    """Within a program JAX pads them: here the batch stays whole, the numbers are right, and it is said."""
    run(
        """
        mesh = mesh_of(data=8)
        model = torchleaf.TorchModule(network)

        @eqx.filter_jit
        def loss(model, x):
            x = jax.lax.with_sharding_constraint(x[:10] * 2, NamedSharding(mesh, P("data")))
            return jnp.sum(jnp.sin(jax.vmap(model)(x)))

        def on_one(model, x):
            return jnp.sum(jnp.sin(jax.vmap(model)(x[:10] * 2)))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = eqx.filter_value_and_grad(loss)(put(model, mesh), put(x, mesh, "data"))
        assert_close(jax.tree.leaves(got), jax.tree.leaves(eqx.filter_value_and_grad(on_one)(model, x)), 2e-5)
        (said,) = {str(w.message) for w in caught}
        assert "argument input is split over 'data' (which cannot split its batch of 10 evenly)" in said, said
        """
    )


def test_a_plain_call_on_a_batch_is_gathered_and_says_so_once():
    run(
        """
        mesh = mesh_of(data=8)
        model = torchleaf.TorchModule(network)
        everywhere, xs = put(model, mesh), put(x, mesh, "data")
        loss = lambda model, x: jnp.sum(jnp.sin(model(x)))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_close(eqx.filter_jit(lambda m, x: m(x))(everywhere, xs), model(x))
            got = eqx.filter_jit(eqx.filter_grad(loss))(everywhere, xs)
            assert "all-gather" in collectives(lambda m, x: m(x), everywhere, xs)
        assert_close(jax.tree.leaves(got), jax.tree.leaves(eqx.filter_grad(loss)(model, x)), 2e-5)
        (said,) = [str(w.message) for w in caught]
        for word in ("Sequential", "argument input", "'data'", "axis 0", "gathered", "jax.vmap", "shard_map"):
            assert word in said, said
        assert eqx.filter_jit(lambda m, x: m(x))(everywhere, put(x, mesh)).shape == (16, 3)  # nothing to gather
        assert residuals.live_graphs() == 0
        """
    )


def test_control_flow_and_named_batches():
    """Calls in `cond`, `while_loop` and under a vmap that names its mesh axis are split as well."""
    run(
        """
        mesh = mesh_of(data=4)
        square = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
        params, static = eqx.partition(torchleaf.TorchModule(square), eqx.is_array)
        each = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
        named = lambda p, x: jax.vmap(eqx.combine(p, static), spmd_axis_name="data")(x)

        def branches(p, x):
            y = jax.lax.cond(p.params["0.bias"][0] > 9, lambda: x, lambda: each(p, x))
            return jnp.sum(jnp.sin(y))

        def loop(p, x):
            return jax.lax.fori_loop(0, 3, lambda _, x: each(p, x), x)

        everywhere, xs = put(params, mesh), put(x, mesh, "data")
        for f in (jax.grad(branches), loop, jax.grad(lambda p, x: jnp.sum(loop(p, x) ** 2)), named):
            assert_close(jax.jit(f)(everywhere, xs), jax.jit(f)(params, x), 2e-5)
            assert {*collectives(f, everywhere, xs)} <= {"all-reduce"}
        assert collectives(loop, everywhere, xs) == {}
        import gc
        gc.collect()
        assert residuals.live_graphs() == 0
        """,
        4,
    )
