"""State and random numbers on several devices: what does not depend on their number, and what is each device's own."""

import pytest
from meshes import run_on_devices as run

pytestmark = pytest.mark.long


def test_masks_do_not_depend_on_the_number_of_devices():
    run(
        """
        noisy = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Dropout(0.5))
        keys = jax.random.split(jax.random.key(1), 16)

        def each(model, x, keys):
            return jax.vmap(lambda x, key: model(x, key=key))(x, keys)

        def shared(model, x, keys):
            return jax.vmap(lambda x: model(x, key=keys[0]))(x)

        for method in ("vmap", "loop"):
            model = torchleaf.TorchModule(noisy, vmap_method=method)
            for f in (each, shared):
                grad = eqx.filter_grad(lambda model, *args: jnp.sum(f(model, *args) ** 2))
                expected, grads = f(model, x, keys), grad(model, x, keys)
                assert 0 < int(jnp.sum(expected == 0)) < 80
                for n in (2, 4, 8):
                    mesh = jax.sharding.Mesh(np.array(jax.devices()[:n]), ("data",))
                    args = put(model, mesh), put(x, mesh, "data"), put(keys, mesh, "data")
                    got = eqx.filter_jit(f)(*args)
                    assert jnp.array_equal(got == 0, expected == 0)
                    assert_close(got, expected)
                    assert_close(jax.tree.leaves(eqx.filter_jit(grad)(*args)), jax.tree.leaves(grads), 2e-5)
            assert collectives(each, *args) == {}
        """
    )


def test_masks_of_native_batches_are_drawn_for_the_whole():
    """By the keys of all examples at once: gathered, and said, so that they are those of one device."""
    run(
        """
        noisy = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Dropout(0.5))
        model = torchleaf.TorchModule(noisy, vmap_method="batched")
        keys = jax.random.split(jax.random.key(1), 16)
        f = lambda model, x, keys: jax.vmap(lambda x, key: model(x, key=key))(x, keys)
        mesh = mesh_of(data=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = eqx.filter_jit(f)(put(model, mesh), put(x, mesh, "data"), put(keys, mesh, "data"))
        assert_close(got, f(model, x, keys))
        (said,) = [str(w.message) for w in caught]
        assert "argument input" in said and "drawn for the whole batch" in said and "vmap_method='vmap'" in said, said
        """
    )


def test_state_that_a_batch_shares_is_that_of_the_whole():
    run(
        """
        from stateful_layers import STATEFUL

        module = STATEFUL["MovingAverage-in-place"].make()
        model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module, vmap_method="batched")
        f = lambda model, state, x: jax.vmap(model, in_axes=(0, None), out_axes=(0, None))(x, state)
        expected = f(model, state, x[:, :3])
        mesh = mesh_of(data=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = eqx.filter_jit(f)(put(model, mesh), put(state, mesh), put(x[:, :3], mesh, "data"))
        assert_close(jax.tree.leaves(got), jax.tree.leaves(expected))
        (said,) = [str(w.message) for w in caught]
        assert "share state" in said, said
        """
    )


def test_members_of_an_ensemble_have_their_state_on_their_device():
    run(
        """
        mesh = mesh_of(members=8)
        modules = [torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5)) for _ in range(8)]
        models, states = zip(*(eqx.nn.make_with_state(torchleaf.TorchModule)(m) for m in modules), strict=True)
        model, state = torchleaf.stack(models), torchleaf.stack(states)
        axes = (eqx.if_array(0), eqx.if_array(0), None)
        step = eqx.filter_vmap(lambda m, s, x: m(x, state=s), in_axes=axes)
        spread, xs = (put(model, mesh, "members"), put(state, mesh, "members")), put(x, mesh)
        got, expected = eqx.filter_jit(step)(*spread, xs), step(model, state, x)
        assert_close(jax.tree.leaves(got), jax.tree.leaves(expected), 2e-5)
        assert collectives(step, *spread, xs) == {}
        """
    )


def test_batch_statistics_of_each_device_and_of_all():
    """In `shard_map` torch's BatchNorm knows a device's part only; with `axis_name` JAX has the statistics of all."""
    run(
        """
        mesh = mesh_of(data=4)
        trunk, norm = torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5)
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
        xt = torchleaf.to_torch(x, copy=True)

        # Local: each device as torch on its part, running statistics averaged over devices by the user.
        model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(torch.nn.Sequential(trunk, norm), copy=True)

        weights, static = eqx.partition(model, eqx.is_array)

        @jax.jit
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P("data"), P())
        )
        def local(weights, state, x):
            try:
                eqx.combine(weights, static)(x, state=state)
            except torchleaf.StateError as error:
                assert all(word in str(error) for word in ("buffer `1.", "pcast(b, ('data',), to=", "pmean"))
            else:
                raise AssertionError("the state of all and of each should not have been mixed")
            state = jax.tree.map(lambda b: jax.lax.pcast(b, "data", to="varying"), state)
            y, state = eqx.combine(weights, static)(x, state=state)
            return y, jax.tree.map(lambda b: jax.lax.pmean(b.astype(jnp.float32), "data").astype(b.dtype), state)

        y, after = local(weights, state, put(x, mesh, "data"))
        parts, means = [], []
        for part in xt.chunk(4):
            twin = torch.nn.Sequential(trunk, torch.nn.BatchNorm1d(5))
            twin[1].load_state_dict(norm.state_dict())
            parts.append(twin(part).detach())
            means.append(twin[1].running_mean)
        np.testing.assert_allclose(y, torch.cat(parts), rtol=1e-4, atol=1e-5)
        running = after.get(model.buffer_index)["1.running_mean"]
        np.testing.assert_allclose(running, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)

        # Global: torch's weights, JAX's statistics.
        def batch_norm(layer, x, axis_name, eps=1e-5):
            mean = jax.lax.pmean(jnp.mean(x, 0), axis_name)
            var = jax.lax.pmean(jnp.mean(x**2, 0), axis_name) - mean**2
            return (x - mean) * jax.lax.rsqrt(var + eps) * layer.params["weight"] + layer.params["bias"]

        first, second = torchleaf.TorchModule(trunk), torchleaf.TorchModule(norm)

        weights, static = eqx.partition((first, second), eqx.is_array)

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        def loss(weights, x):
            first, second = eqx.combine(weights, static)
            return jax.lax.psum(jnp.sum(jnp.sin(batch_norm(second, first(x), "data"))), "data")

        trained, rest = eqx.partition(weights, eqx.is_inexact_array)  # `num_batches_tracked` is none
        value, grads = jax.jit(jax.value_and_grad(lambda w, x: loss(eqx.combine(w, rest), x)))(
            trained, put(x, mesh, "data")
        )
        expected = torch.sin(norm.train()(trunk(xt))).sum()
        expected.backward()
        np.testing.assert_allclose(value, float(expected.detach()), rtol=1e-4)
        for model, module in zip(grads, (trunk, norm), strict=True):
            for name, grad in model.params.items():
                np.testing.assert_allclose(grad, module.get_parameter(name).grad, rtol=1e-3, atol=1e-4)
        assert residuals.live_graphs() == 0
        """,
        4,
    )
