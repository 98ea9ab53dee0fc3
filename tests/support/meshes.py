"""Programs on several devices: in a process that has them, what is sharded how and which collectives there are."""

import os
import re
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


def on_devices(script: str, n: int = 8, **environment: str) -> str:
    """What the indented `script` prints in a process of its own with `n` CPU devices, where it finds this module."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
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
    return eqx.filter_shard(tree, sharding)


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
