"""`jax.shard_map`, with `check_vma`: values, gradients and second derivatives, and how a model is spread by hand."""

import pytest
from meshes import run_on_devices as run

pytestmark = pytest.mark.long


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("n", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_transformation_outside_and_inside(n, kind):
    """Transformations of a program with `shard_map`, and `shard_map` of transformed functions."""
    run(
        f"""
        params, static = eqx.partition(torchleaf.TorchModule(network), eqx.is_array)
        mesh = mesh_of("{kind}", data={n})
        one = lambda p, x: eqx.combine(p, static)(x)
        split = dict(in_specs=(P(), P("data")), mesh=mesh)

        @jax.jit
        @functools.partial(jax.shard_map, out_specs=P(), **split)
        def loss(p, x):
            return jax.lax.psum(jnp.sum(jnp.sin(one(p, x))), "data")

        def whole(p, x):
            return jnp.sum(jnp.sin(one(p, x)))

        def hvp(f):
            return lambda p, x: jax.jvp(lambda p: jax.grad(f)(p, x), (p,), (p,))[1]

        def squared(f):
            return jax.grad(lambda p, x: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(f)(p, x))))

        everywhere, xs = put(params, mesh), put(x, mesh, "data")
        for name, of in {{
            "value": lambda f: f,
            "grad": lambda f: jax.grad(f, (0, 1)),
            "value and grad": jax.value_and_grad,
            "jvp": lambda f: lambda p, x: jax.jvp(f, (p, x), (p, x)),
            "hvp": hvp,
            "grad of grad": squared,
            "remat": lambda f: jax.grad(jax.checkpoint(f)),
        }}.items():
            expected = jax.jit(of(whole))(params, x)
            with jax.set_mesh(mesh):
                assert_close(jax.jit(of(loss))(everywhere, xs), expected, 2e-5)
                assert_close(of(loss)(everywhere, xs), expected, 2e-5)
                found = collectives(of(loss), everywhere, xs)
            assert {{*found}} <= {{"all-reduce"}}, (name, found)

        table = transformations(one)
        for name in ("forward", "grad by x", "jvp", "jacrev of examples", "jacfwd of examples", "hessian of examples"):
            f, _ = table[name]
            spread = jax.shard_map(f, out_specs=P("data"), **split)
            assert_close(jax.jit(spread)(everywhere, xs), jax.jit(f)(params, x), 2e-5)
            assert collectives(spread, everywhere, xs) == {{}}, name

        @functools.partial(jax.shard_map, out_specs=P(), **split)
        def grads_inside(p, x):
            return jax.grad(lambda p: jnp.sum(jnp.sin(one(p, x))))(p)

        assert_close(jax.jit(grads_inside)(everywhere, xs), jax.grad(whole)(params, x), 2e-5)
        assert collectives(grads_inside, everywhere, xs) == {{"all-reduce": 1}}
        assert residuals.live_graphs() == 0
        """,
        n,
    )


def test_some_axes_manual_and_others_not():
    """The numbers are right; that a call is not split over the others is said."""
    run(
        """
        params, static = eqx.partition(torchleaf.TorchModule(network), eqx.is_array)
        one = lambda p, x: eqx.combine(p, static)(x)
        whole = lambda p, x: jnp.sum(jnp.sin(one(p, x)))
        said = []
        for kind in ("Auto", "Explicit"):
            mesh = mesh_of(kind, data=4, model=2)
            loss = jax.shard_map(
                lambda p, x: jax.lax.psum(whole(p, x), "data"),
                mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), axis_names={"data"},
            )
            everywhere, xs = put(params, mesh), put(x, mesh, "data")
            with jax.set_mesh(mesh), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert_close(jax.jit(jax.grad(loss, (0, 1)))(everywhere, xs), jax.grad(whole, (0, 1))(params, x), 2e-5)
            said += [str(w.message) for w in caught]
        assert len(said) == 1 and "mesh axes 'model'" in said[0] and "axis_names" in said[0], said
        assert residuals.live_graphs() == 0
        """
    )


def test_fully_sharded_parameters():
    """FSDP: a device has a part of every parameter, gathers all for the call, and gets its part of the gradients."""
    run(
        """
        mesh = mesh_of(data=4)
        wide = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        params, static = eqx.partition(torchleaf.TorchModule(wide), eqx.is_array)

        def whole(p, x):
            return jnp.sum(jnp.sin(eqx.combine(p, static)(x)))

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
        def loss(p, x):
            p = jax.tree.map(lambda w: jax.lax.all_gather(w, "data", tiled=True), p)
            return jax.lax.psum(whole(p, x), "data")

        spread, xs = put(params, mesh, "data"), put(x, mesh, "data")
        grads = jax.jit(jax.grad(loss))(spread, xs)
        assert_close(grads, jax.grad(whole)(params, x), 2e-5)
        for grad in jax.tree.leaves(grads):
            assert grad.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), grad.ndim)
        found = collectives(jax.grad(loss), spread, xs)
        assert found.keys() == {"all-gather", "reduce-scatter"}, found

        # With automatic axes, weights are gathered as those of JAX's own layers are, without a warning.
        automatic = lambda p, x: jnp.sum(jnp.sin(jax.vmap(eqx.combine(p, static))(x)))
        assert_close(jax.jit(jax.grad(automatic))(spread, xs), jax.grad(whole)(params, x), 2e-5)
        assert "all-gather" in collectives(jax.grad(automatic), spread, xs)
        assert residuals.live_graphs() == 0
        """,
        4,
    )


def test_tensor_parallel_pairs():
    """Two torch Linears, the first split along its outputs and the second along its inputs, with one `psum`."""
    run(
        """
        mesh = mesh_of(data=2, model=4)
        up, down = torch.nn.Linear(4, 16), torch.nn.Linear(16, 3, bias=False)
        linear = torchleaf.torch_function(torch.nn.functional.linear)
        params = torchleaf.to_jax({"up": up.weight, "bias": up.bias, "down": down.weight})
        specs = {"up": P("model"), "bias": P("model"), "down": P(None, "model")}

        def part(p, x):
            return linear(jnp.tanh(linear(x, p["up"], p["bias"])), p["down"])

        def whole(p, x):
            return jnp.sum(jnp.sin(part(p, x)))

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, P("data")), out_specs=P())
        def loss(p, x):
            y = jax.lax.psum(part(p, x), "model")
            return jax.lax.psum(jnp.sum(jnp.sin(y)), "data")

        spread = {name: put(w, mesh, *specs[name]) for name, w in params.items()}
        xs = put(x, mesh, "data")
        with torch.no_grad():
            expected = torch.sin(down(torch.tanh(up(torchleaf.to_torch(x, copy=True))))).sum()
        np.testing.assert_allclose(float(jax.jit(loss)(spread, xs)), float(expected), rtol=1e-4)
        for f in (jax.grad, lambda f: lambda p, x: jax.jvp(lambda p: jax.grad(f)(p, x), (p,), (p,))[1]):
            assert_close(jax.jit(f(loss))(spread, xs), jax.jit(f(whole))(params, x), 1e-4)
            assert {*collectives(f(loss), spread, xs)} == {"all-reduce"}
        assert residuals.live_graphs() == 0
        """
    )


def test_state_and_keys_of_each_device():
    """A Linen model's `apply` and an NNX model, each device with a key and statistics of its own: as part by part."""
    run(
        """
        from flax import nnx

        mesh = mesh_of(data=4)
        noisy = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.5))
        model = torchleaf.linen.TorchModule(noisy, copy_weights=True)
        variables, key = model.init(jax.random.key(0), x), jax.random.key(1)

        def one(variables, x, key):
            y, new = model.apply(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])
            return y, jax.tree.map(lambda b: b[None], new)

        def each(variables, x):
            variables = jax.tree.map(lambda b: jax.lax.pcast(b, "data", to="varying"), variables)
            return one(variables, x, jax.random.fold_in(key, jax.lax.axis_index("data")))

        split = dict(mesh=mesh, in_specs=(P(), P("data")))
        got = jax.jit(jax.shard_map(each, out_specs=P("data"), **split))(variables, put(x, mesh, "data"))
        parts = [one(variables, part, jax.random.fold_in(key, i)) for i, part in enumerate(jnp.split(x, 4))]
        assert_close(got, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts))

        def loss(f):
            return lambda params, x: f({**variables, "params": params}, x)

        total = jax.shard_map(lambda v, x: jax.lax.psum(jnp.sum(each(v, x)[0] ** 2), "data"), out_specs=P(), **split)
        by_parts = lambda v, x: sum(
            jnp.sum(one(v, part, jax.random.fold_in(key, i))[0] ** 2) for i, part in enumerate(jnp.split(x, 4))
        )
        got = jax.jit(jax.grad(loss(total)))(variables["params"], put(x, mesh, "data"))
        assert_close(got, jax.grad(loss(by_parts))(variables["params"], x), 1e-4)

        drop = torchleaf.nnx.TorchModule(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Dropout(0.5)))
        folded = lambda m, x, i: m(x, rngs=nnx.Rngs(jax.random.fold_in(key, i)))
        call = nnx.shard_map(lambda m, x: folded(m, x, jax.lax.axis_index("data")), out_specs=P("data"), **split)
        expected = jnp.concatenate([folded(drop, part, i) for i, part in enumerate(jnp.split(x, 4))])
        assert_close(nnx.jit(call)(drop, put(x, mesh, "data")), expected)
        assert residuals.live_graphs() == 0
        """,
        4,
    )
