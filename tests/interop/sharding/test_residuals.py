"""Graphs on several devices: each belongs to the examples it was made for, is used by them, and none stays behind."""

import pytest
from meshes import run_on_devices as run

pytestmark = pytest.mark.long

_COUNTED = """
from torchleaf.interop.calls.graph import Graph, Tape

used, forwards = [], []
for kind, method in ((Graph, "pullback"), (Tape, "replay")):
    def counted(self, *args, _run=getattr(kind, method), _name=kind.__name__):
        used.append(_name)
        return _run(self, *args)
    setattr(kind, method, counted)

class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network

    def forward(self, x):
        forwards.append(x.shape)
        return self.inner(x)
"""


def test_live_graphs_are_used_on_every_device():
    """Each backward call takes the graph of its own device: nothing is computed twice, with jit and without."""
    run(
        _COUNTED
        + """
mesh = mesh_of(data=4)
wrapped = torchleaf.TorchModule(Counting(), replay=False)
params, static = eqx.partition(wrapped, eqx.is_array)
loss = lambda p, x: jnp.sum(jnp.sin(jax.vmap(eqx.combine(p, static))(x)))
everywhere, xs = put(params, mesh), put(x, mesh, "data")
expected = jax.grad(loss)(params, x)
for grad in (jax.jit(jax.grad(loss)), jax.grad(loss)):
    for _ in range(3):
        jax.block_until_ready(grad(everywhere, xs))  # compiled, its plans proven
    used.clear(), forwards.clear()
    assert_close(grad(everywhere, xs), expected, 2e-5)
    assert used == ["Graph"] * 4, used
    assert len(forwards) == 4, forwards
    assert residuals.live_graphs() == 0

replayed = torchleaf.TorchModule(network)
params, static = eqx.partition(replayed, eqx.is_array)
grad = jax.jit(jax.grad(lambda p, x: jnp.sum(jnp.sin(jax.vmap(eqx.combine(p, static))(x)))))
for _ in range(5):
    jax.block_until_ready(grad(put(params, mesh), xs))
used.clear()
jax.block_until_ready(grad(put(params, mesh), xs))
assert used == ["Tape"] * 4, used
assert residuals.live_graphs() == 0
""",
        4,
    )


def test_a_backward_that_is_split_otherwise_runs_the_forward_again():
    """Graphs of parts are not those of other parts of the same size, nor of the whole."""
    run(
        _COUNTED
        + """
mesh = mesh_of(a=2, b=2)
model = torchleaf.TorchModule(network)
params, static = eqx.partition(model, eqx.is_array)
f = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
y, pull = jax.vjp(f, params, x)
ct = jnp.cos(y)
expected = jax.tree.leaves(pull(ct))
specs = [("a",), (("a", "b"),), (("b", "a"),), ()]
for forward in specs:
    for backward in specs:
        _, pull = jax.vjp(f, put(params, mesh), put(x, mesh, *forward))

        @jax.jit
        def again(pull, ct, backward=backward):
            constrained = lambda v: jax.lax.with_sharding_constraint(v, NamedSharding(mesh, P(*backward)))
            batched = lambda v: constrained(v) if v.shape[:1] == (16,) else v
            return jax.tree.map(batched, pull)(batched(ct))

        used.clear()
        got = jax.tree.leaves(again(pull, put(ct, mesh, *backward)))
        assert_close(got, expected, 2e-5)
        print(forward, backward, len(used))
        if forward == backward:
            assert len(used) == 4, (forward, used)
        del pull, again
import gc
gc.collect()
assert residuals.live_graphs() == 0, residuals.live_graphs()
""",
        4,
    )


def test_memory_is_flat_over_500_steps():
    """Data parallel and `shard_map`, also where a branch of the loss is dropped: megabytes, and graphs in the store."""
    out = run(
        """
import gc
import resource

mesh = mesh_of(data=4)
wide = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64))
params, static = eqx.partition(torchleaf.TorchModule(wide), eqx.is_array)
one = lambda p, x: eqx.combine(p, static)(x)
big = jax.random.normal(jax.random.key(0), (256, 64))
loss = lambda p, x: jnp.sum(jax.vmap(one, (None, 0))(p, x) ** 2) / 1e5
dropped = lambda p, x: loss(p, x) + jax.lax.stop_gradient(loss(p, x + 1))
split = dict(mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
manual = jax.shard_map(lambda p, x: jax.lax.psum(jnp.sum(one(p, x) ** 2), "data") / 1e5, **split)


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20


for name, f in (("automatic", loss), ("dropped", dropped), ("manual", manual)):
    step = jax.jit(lambda p, x, f=f: jax.tree.map(lambda w, g: w - 1e-3 * g, p, jax.grad(f)(p, x)))
    p, xs = put(params, mesh), put(big, mesh, "data")
    for i in range(600):
        p = jax.block_until_ready(step(p, xs))
        if i == 99:
            gc.collect()
            before = resident()
    gc.collect()
    print(name, round(resident() - before, 1), "MB")
    assert resident() - before < 16, (name, before, resident())
    assert residuals.live_graphs() == 0
""",
        4,
    )
    assert out.count("MB") == 3
