"""Programs on several devices: in a process that has them, what is sharded how and which collectives there are."""

import os
import re
import textwrap
from pathlib import Path

from fresh_process import run_python

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


PRELUDE = """\
import functools
import warnings
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchleaf
from jax.sharding import NamedSharding, PartitionSpec as P
from meshes import assert_close, collectives, mesh_of, put, transformations
from torchleaf.interop.calls import residuals

torch.set_num_threads(1)
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
x = jax.random.normal(jax.random.key(0), (16, 4))
"""


def run_on_devices(script: str, n: int = 8, **environment: str) -> str:
    """`on_devices` with imports, a small `network` and a batch `x` of 16 for it."""
    return on_devices(PRELUDE + textwrap.dedent(script), n, **environment)


def on_devices(script: str, n: int = 8, **environment: str) -> str:
    """What the indented `script` prints in a process of its own with `n` CPU devices, where it finds this module."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    flags = f"--xla_force_host_platform_device_count={n}"
    return run_python(script, XLA_FLAGS=flags, PYTHONPATH=os.pathsep.join(paths), **environment)


def mesh_of(kind="Auto", **axes):
    """A mesh of axes by name and size, all of one kind."""
    import jax

    types = (getattr(jax.sharding.AxisType, kind),) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def put(tree, mesh, *spec):
    """The arrays of a tree, sharded alike."""
    import equinox as eqx
    import jax

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, sharding), rest)


def compiled(f, *args):
    """The text of the compiled program."""
    import equinox as eqx

    return eqx.filter_jit(f).lower(*args).compile().compiled.as_text()


def collectives(f, *args):
    """The collectives in the compiled program of a call: kind to number."""
    text = compiled(f, *args)
    assert "torchleaf_call" in text
    counts = {kind: len(re.findall(rf"\) {kind}(?:-start)?\(|\S {kind}(?:-start)?\(", text)) for kind in _COLLECTIVES}
    return {kind: n for kind, n in counts.items() if n}


def assert_close(got, expected, tolerance=1e-5):
    """Trees of the same structure, dtypes and, but for rounding, values."""
    import jax
    import numpy as np

    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if hasattr(y, "dtype"):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)


def transformations(one):
    """What JAX makes of a function `one(params, x)` of one example: name to function of `params` and a batch, and the
    collectives that it takes when the batch is split (None: JAX's own are among them)."""
    import jax
    import jax.numpy as jnp

    def per_example(f):
        return jax.vmap(f, (None, 0))

    def loss(params, x):
        return jnp.sum(jnp.sin(per_example(one)(params, x)))

    def descent(params, x):
        def step(params, _):
            return jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params, x)), loss(params, x)

        return jax.lax.scan(step, params, None, length=3)

    grad, one_sum = jax.grad(loss), {"all-reduce": 1}
    return {
        "forward": (per_example(one), {}),
        "grad": (grad, one_sum),
        "grad by x": (jax.grad(loss, 1), {}),
        "jvp": (lambda p, x: jax.jvp(lambda x: per_example(one)(p, x), (x,), (jnp.cos(x),)), {}),
        "jacrev of examples": (per_example(jax.jacrev(one, 1)), {}),
        "jacfwd of examples": (per_example(jax.jacfwd(one, 1)), {}),
        "hessian of examples": (per_example(jax.hessian(one, 1)), {}),
        "gradients of examples": (per_example(jax.grad(lambda p, x: one(p, x).sum())), {}),
        "hvp": (lambda p, x: jax.jvp(lambda p: grad(p, x), (p,), (p,))[1], one_sum),
        "remat": (jax.grad(jax.checkpoint(loss)), one_sum),
        "value and grad": (jax.value_and_grad(loss), None),  # the sum of the losses is JAX's own
        "grad of grad": (jax.grad(lambda p, x: sum(jnp.sum(g**2) for g in jax.tree.leaves(grad(p, x)))), None),
        "scan": (descent, None),
    }
