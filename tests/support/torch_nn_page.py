"""The page of the guide that says how each class of torch.nn works, from the specs that the tests run.

`python tests/support/torch_nn_page.py > docs/torch_nn.md` writes it.
"""

from collections.abc import Iterator, Sequence

import jax
import torch
from layer_catalogue import LayerSpec
from torch_nn_specs import REFUSED, SECTIONS, WITHOUT_FORWARD, class_name

HEAD = """\
# torch.nn, class by class

How each class of `torch.nn` works as a `torchleaf.TorchModule`. The tests run all of them and compare with torch:
output and gradients, with and without `jit`, one example and a batch by `vmap`, in training mode too.

- **gradient**: of what. Integer inputs, such as labels, have none.
- **vmap**: *batched* is one call of torch's batched kernels. *loop* runs example by example inside one call, as torch
  has no batching rule; a warning says so. Where the layer takes a batch axis itself, `vmap_method="batched"` avoids it.
- **state**: whether training mode changes buffers, which `eqx.nn.make_with_state` makes explicit.
- **random**: when it needs `key=`.

```python
import equinox as eqx
import jax
import jax.numpy as jnp
import torch
import torchleaf

module = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module)
y, state = model(jnp.ones((8, 4)), state=state, key=jax.random.key(0))

evaluate = eqx.nn.inference_mode(model)
y, state = evaluate(jnp.ones((8, 4)), state=state)
```

This page is written by `python tests/support/torch_nn_page.py > docs/torch_nn.md`.
"""

TABLE = """
## {}

| class | forward | gradient | vmap | state | random | note |
|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The text of the page."""
    tables = [TABLE.format(title) + "".join(_rows(specs)) for title, specs in SECTIONS.items()]
    excluded = {name: f"{what} It has no forward: wrap a subclass." for name, what in WITHOUT_FORWARD.items()} | REFUSED
    rows = [f"| {name} | no | | | | | {reason} |\n" for name, reason in excluded.items()]
    return HEAD + "".join(tables) + TABLE.format("Not layers, or not supported") + "".join(rows)


def _rows(specs: Sequence[LayerSpec]) -> Iterator[str]:
    for name in dict.fromkeys(map(class_name, specs)):
        if not hasattr(torch.nn, name):  # new in a newer version of torch
            continue
        variants = [spec for spec in specs if class_name(spec) == name]
        loops = {spec.loops for spec in variants}
        cells = (
            name,
            "yes",
            ", ".join(sorted({what for spec in variants for what in _differentiable(spec)}, reverse=True)),
            "batched or loop" if len(loops) > 1 else "loop" if True in loops else "batched",
            "in training" if any(spec.stateful for spec in variants) else "",
            ", ".join(sorted({spec.random for spec in variants} - {"never"})),
            " ".join(dict.fromkeys(spec.note for spec in variants if spec.note)),
        )
        yield "|" + "".join(f" {cell} |" if cell else " |" for cell in cells) + "\n"


def _differentiable(spec: LayerSpec) -> Iterator[str]:
    if any(p.requires_grad for p in spec.make().parameters()):
        yield "parameters"
    if any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in jax.tree.leaves(spec.draw())):
        yield "inputs"


if __name__ == "__main__":
    print(page(), end="")
