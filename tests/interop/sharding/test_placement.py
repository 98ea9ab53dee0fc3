"""Where the leaves of models lie: as those of JAX's own modules, they follow what they are computed with."""

import pytest
from meshes import run_on_devices as run

pytestmark = pytest.mark.long


def test_equinox():
    run(
        """
        mesh = mesh_of(data=8)
        model, xs = torchleaf.TorchModule(network), put(x, mesh, "data")
        call = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))
        expected, spread = jax.vmap(model)(x), NamedSharding(mesh, P("data"))
        assert not any(leaf.committed for leaf in jax.tree.leaves(model.params))

        linear = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        assert call(linear, xs).sharding == call(model, xs).sharding == spread
        everywhere = NamedSharding(mesh, P())
        for placed in (
            model,
            eqx.filter_shard(model, everywhere),
            eqx.filter_jit(eqx.filter_shard)(model, everywhere),
            eqx.combine(*(jax.device_put(part, everywhere) if i == 0 else part
                          for i, part in enumerate(eqx.partition(model, eqx.is_array)))),
        ):
            assert call(placed, xs).sharding == spread
            assert_close(call(placed, xs), expected)
        moved = jax.device_put(model, everywhere)
        assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(moved))
        assert_close(jax.vmap(moved)(xs), expected)
        try:
            call(moved, xs)
        except TypeError as error:
            assert "eqx.filter_shard instead of jax.device_put" in str(error)
        else:
            raise AssertionError("an array for a flag should have been refused")

        # Layouts that are not JAX's are read wrongly on other devices, so these are copies.
        conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        images = jax.random.normal(jax.random.key(1), (8, 3, 5, 5))
        model = torchleaf.TorchModule(conv)
        assert not any(leaf.committed for leaf in jax.tree.leaves(model.params))
        with torch.no_grad():
            expected = conv(torchleaf.to_torch(images, copy=True)).contiguous().numpy()
        for placed in (model, put(model, mesh), eqx.filter_shard(model, everywhere)):
            assert_close(call(placed, put(images, mesh, "data")), jnp.asarray(expected))
        """
    )


def test_linen():
    """Partitioning metadata by initialisers, logical axis rules, and a sharded init."""
    run(
        """
        from flax import linen as nn

        mesh = mesh_of(data=4, model=2)
        xs = put(x, mesh, "data")
        plain = torchleaf.linen.TorchModule(network)
        variables = plain.init(jax.random.key(0), x)
        apply = jax.jit(lambda v, x: jax.vmap(lambda x: plain.apply(v, x))(x))
        assert apply(variables, xs).sharding == NamedSharding(mesh, P("data"))
        assert_close(apply(variables, xs), plain.apply(variables, x))
        assert jax.tree.leaves(nn.get_partition_spec(variables)) == [P()] * 4

        normal = nn.initializers.lecun_normal()
        for partitioned, rules, weight in (
            (nn.with_partitioning(normal, ("model", None)), None, P("model", None)),
            (nn.with_logical_partitioning(normal, ("out", "in")), [("out", "model"), ("in", None)], P("model", None)),
        ):
            model = torchleaf.linen.TorchModule(torch.nn.Linear(4, 8), initializer={"weight": partitioned})

            def init(key, model=model):
                return model.init(key, x)

            specs = nn.get_partition_spec(jax.eval_shape(init, jax.random.key(0)))
            shardings = (
                jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda s: isinstance(s, P))
                if rules is None
                else nn.logical_to_mesh_sharding(specs, mesh, rules)
            )
            variables = jax.jit(lambda key: nn.unbox(init(key)), out_shardings=nn.unbox(shardings))(jax.random.key(0))
            got = variables["params"]["weight"].sharding
            assert got.is_equivalent_to(NamedSharding(mesh, weight), 2), got
            assert_close(variables, nn.unbox(init(jax.random.key(0))))

            # Split over another mesh axis than the batch: gathered, which is said.
            loss = lambda v, x, model=model: jnp.sum(jnp.sin(jax.vmap(lambda x: model.apply(v, x))(x)))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                grads = jax.jit(jax.grad(loss))(variables, xs)
            assert_close(grads, jax.grad(loss)(nn.unbox(init(jax.random.key(0))), x), 2e-5)
            if rules is None:  # said once for each callable
                (said,) = [str(w.message) for w in caught]
                assert "weight is split over 'model' along axis 0" in said, said
        """
    )


def test_nnx():
    """Partition specs, an init under `nnx.jit` with sharded Variables, data parallel training, `nnx.shard_map`."""
    run(
        """
        import optax
        from flax import nnx

        mesh = mesh_of(data=8)
        xs = put(x, mesh, "data")
        model = torchleaf.nnx.TorchModule(network)
        specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model)))
        assert jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)) == [P()] * 4

        @nnx.jit
        def create():
            model = torchleaf.nnx.TorchModule(torch.nn.Linear(8, 8))
            state = nnx.state(model)
            nnx.update(model, jax.lax.with_sharding_constraint(state, jax.tree.map(lambda _: P("data"), state)))
            return model

        with jax.set_mesh(mesh):
            created = create()
        assert created.weight.get_value().sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)

        def steps(x):
            model = torchleaf.nnx.TorchModule(network, copy=True)
            optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

            @nnx.jit
            def step(model, optimizer, x):
                loss, grads = nnx.value_and_grad(lambda m: jnp.sum(jnp.sin(jax.vmap(m)(x))))(model)
                optimizer.update(model, grads)
                return loss

            losses = [step(model, optimizer, x) for _ in range(3)]
            return losses, nnx.to_pure_dict(nnx.state(model))

        assert_close(steps(xs), steps(x), 1e-4)

        split = dict(mesh=mesh, in_specs=(P(), P("data")))
        call = nnx.jit(nnx.shard_map(lambda m, x: m(x), out_specs=P("data"), **split))
        assert_close(call(model, xs), model(x))
        loss = nnx.shard_map(lambda m, x: jax.lax.psum(jnp.sum(jnp.sin(m(x))), "data"), out_specs=P(), **split)
        got = nnx.jit(nnx.grad(loss))(model, xs)
        assert_close(nnx.to_pure_dict(got), nnx.to_pure_dict(nnx.grad(lambda m: jnp.sum(jnp.sin(m(x))))(model)), 2e-5)
        """
    )
