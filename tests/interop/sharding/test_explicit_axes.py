"""Explicit axes: the types of results say how they lie, and what cannot be split is an error with a remedy."""

import pytest
from meshes import run_on_devices as run

pytestmark = pytest.mark.long


@pytest.mark.parametrize("n", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_transformation_against_one_device(n):
    run(
        f"""
        params, static = eqx.partition(torchleaf.TorchModule(network), eqx.is_array)
        mesh = mesh_of("Explicit", data={n})

        def one(params, x):
            return eqx.combine(params, static)(x)

        def in_jax(params, x):
            p = params.params
            return p["2.weight"] @ jnp.tanh(p["0.weight"] @ x + p["0.bias"]) + p["2.bias"]

        written, compared = transformations(in_jax), 0
        for name, (f, allowed) in transformations(one).items():
            expected = jax.jit(f)(params, x)
            with jax.set_mesh(mesh):
                everywhere, xs = put(params, mesh), put(x, mesh, "data")
                assert_close(jax.jit(f)(everywhere, xs), expected, 2e-5)
                found = collectives(f, everywhere, xs)
                assert found == allowed if allowed is not None else {{*found}} == {{"all-reduce"}}, (name, found)
                try:
                    same = jax.eval_shape(written[name][0], everywhere, xs)
                except Exception:  # JAX's own rules cannot tell
                    continue
                compared += 1
                for mine, jaxs in zip(
                    jax.tree.leaves(jax.eval_shape(f, everywhere, xs)), jax.tree.leaves(same), strict=True
                ):
                    assert mine.sharding.spec == jaxs.sharding.spec, (name, mine.sharding, jaxs.sharding)
        assert compared >= 10
        assert residuals.live_graphs() == 0
        """,
        n,
    )


def test_what_cannot_be_split_is_refused():
    run(
        """
        mesh = mesh_of("Explicit", a=2, b=4)
        model = torchleaf.TorchModule(network)
        pair = torchleaf.torch_function(lambda x, y: x * y)

        def refused(f, *args, words):
            try:
                f(*args)
            except torchleaf.TorchCallError as error:
                for word in words:
                    assert word in str(error), (word, str(error))
            else:
                raise AssertionError(words)

        with jax.set_mesh(mesh):
            xs = put(x, mesh, "a")
            ways = ("jax.vmap", "shard_map", "jax.sharding.reshard")
            refused(model, xs, words=("argument input", "float32[16@a,4]", "axis 0", "Sequential", *ways))
            refused(jax.jit(lambda x: model(x)), xs, words=("argument input", "float32[16@a,4]", *ways))
            refused(jax.vmap(model), put(x, mesh, None, "b"), words=("argument input", "float32[16,4@b]", *ways))
            nested = jax.vmap(lambda x: jax.vmap(lambda y: pair(x, y))(xs))
            refused(nested, xs, words=("two batches over one mesh axis", "reshard"))
            # The remedies.
            expected = jax.vmap(model)(x)
            assert_close(model(jax.sharding.reshard(xs, P())), expected)
            assert_close(jax.vmap(model)(xs), expected)
            assert_close(jax.shard_map(model, out_specs=P("a"), in_specs=P("a"))(xs), expected)
            assert jax.typeof(nested(put(x, mesh))).sharding.spec == P(None, "a", None)
        """
    )


def test_weights_that_are_split():
    """Explicitly sharded weights (FSDP) are refused by name; gathered by `reshard`, their gradients are split again."""
    run(
        """
        mesh = mesh_of("Explicit", data=8)
        linear = torchleaf.TorchModule(torch.nn.Linear(4, 8))
        params, static = eqx.partition(linear, eqx.is_array)
        loss = lambda p, x: jnp.sum(jnp.sin(jax.vmap(eqx.combine(p, static))(x)))
        with jax.set_mesh(mesh):
            spread, xs = put(params, mesh, "data"), put(x, mesh, "data")
            try:
                loss(spread, xs)
            except torchleaf.TorchCallError as error:
                assert "weight" in str(error) or "bias" in str(error)
                assert "@data" in str(error) and "reshard" in str(error)
            else:
                raise AssertionError("split weights should have been refused")
            gathered = lambda p, x: loss(jax.tree.map(lambda w: jax.sharding.reshard(w, P()), p), x)
            grads = jax.jit(jax.grad(gathered))(spread, xs)
            assert all(g.sharding.spec[0] == "data" for g in jax.tree.leaves(grads))
            found = collectives(jax.grad(gathered), spread, xs)
            assert found.get("all-gather") in (1, 2) and "all-to-all" not in found, found
        assert_close(grads, jax.grad(loss)(params, x), 2e-5)
        """
    )
