"""A model with a torch layer, exported: it predicts, and goes on training, in a process that has no torch.

With `engine="xla"` torch says once which ops its layers are made of, and JAX computes them, so what comes out is an
ordinary program of JAX's. `jax.export` writes two of them to files: prediction, and a whole step of training. Another
process, which cannot import torch or torchleaf, reads them and trains on. Its losses and predictions are compared with
those of this one, and with torch's.

    python examples/export.py --output export.png
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
import torch
import torchleaf
from digits import load_data
from gallery import DARK, LIGHT, RED, check, figure, parse_arguments, progress, save, show_images
from jax import export
from jaxtyping import Array, Float, Int

BATCH = 64
OPTIMIZER = optax.adam(1e-3)
ELSEWHERE = """
import sys

sys.modules.update(torch=None, torchleaf=None)  # whoever imports them gets an ImportError
import numpy as np
from jax import export

predict, step = (export.deserialize(bytearray(open(name, "rb").read())) for name in ("predict", "step"))
data, losses = np.load("data.npz"), []
leaves = [data[f"leaf{i}"] for i in range(int(data["leaves"]))]
for images, labels in zip(data["images"], data["labels"]):
    leaves, loss = step.call(leaves, images, labels)
    losses.append(float(loss))
logits = predict.call(leaves, data["unknown"])
assert "equinox" not in sys.modules and sys.modules["torch"] is None
np.savez("results.npz", losses=losses, logits=logits)
"""


class Encoder(torch.nn.Module):
    """A vision transformer of one block: patches, attention between them, and their mean."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.patches = torch.nn.Conv2d(1, width, 2, stride=2)
        self.places = torch.nn.Parameter(0.1 * torch.randn(16, width))
        self.norm = torch.nn.LayerNorm(width)
        self.attention = torch.nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = torch.nn.Sequential(
            torch.nn.LayerNorm(width), torch.nn.Linear(width, 64), torch.nn.GELU(), torch.nn.Linear(64, width)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`images: [n, 1, 8, 8]`; returns `[n, width]`."""
        x = self.patches(images).flatten(2).mT + self.places
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return (x + self.mlp(x)).mean(1)


class Classifier(eqx.Module):
    """A torch encoder, and a head of Equinox's."""

    encoder: torchleaf.TorchModule
    head: eqx.nn.Linear

    def __call__(self, images: Float[Array, "n 1 8 8"]) -> Float[Array, "n 10"]:
        return jax.vmap(self.head)(self.encoder(images))


def make_programs(model: Classifier):
    """Prediction, and a step of training, as functions of arrays; and the arrays that they start with."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten((params, OPTIMIZER.init(params)))

    @jax.jit
    def predict(leaves: list[Array], images: Float[Array, "n 1 8 8"]) -> Float[Array, "n 10"]:
        return eqx.combine(jax.tree.unflatten(structure, leaves)[0], static)(images)

    @jax.jit
    def step(leaves: list[Array], images: Array, labels: Int[Array, " n"]) -> tuple[list[Array], Float[Array, ""]]:
        params, opt_state = jax.tree.unflatten(structure, leaves)

        def loss_fn(params) -> Float[Array, ""]:
            logits = eqx.combine(params, static)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return jax.tree.leaves((optax.apply_updates(params, updates), opt_state)), loss

    return predict, step, leaves


def export_to(folder: Path, name: str, program, *arguments) -> None:
    """Write a program to a file, for arguments of these shapes and several platforms."""
    exported = export.export(program, platforms=("cpu", "cuda", "tpu"))(*arguments)
    (folder / name).write_bytes(exported.serialize())
    print(f"{f'{name}, kilobytes':58}{(folder / name).stat().st_size / 1000:12.1f}")


def main() -> None:
    """Train, export, train elsewhere, compare, draw."""
    arguments = parse_arguments(__doc__, "export.png")
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    (images, labels), (unknown, solutions) = load_data(arguments.seed)
    rows = np.stack([rng.permutation(len(labels))[:BATCH] for _ in range(60 if arguments.quick else 1500)])
    half = len(rows) // 2

    network = Encoder()
    model = Classifier(
        torchleaf.TorchModule(network, engine="xla", strict=True), eqx.nn.Linear(32, 10, key=jax.random.key(0))
    )
    found, expected = model.encoder(unknown), network(torch.from_numpy(unknown)).detach().numpy()
    check("features, engine='xla' and torch", float(np.abs(found - expected).max()), 1e-4)
    predict, step, leaves = make_programs(model)

    losses, exported = [], leaves
    for (i, chosen), bar in progress(list(enumerate(rows)), "training here"):
        if i == half:
            exported = leaves  # from here on it is trained elsewhere, too
        leaves, loss = step(leaves, images[chosen], labels[chosen])
        losses.append(float(loss))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_to(folder, "predict", predict, exported, unknown)
        export_to(folder, "step", step, exported, images[:BATCH], labels[:BATCH])
        data: dict[str, Any] = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(exported)}
        data |= {
            "leaves": len(exported),
            "images": images[rows[half:]],
            "labels": labels[rows[half:]],
            "unknown": unknown,
        }
        np.savez(folder / "data.npz", **data)
        subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=folder, check=True)
        results = dict(np.load(folder / "results.npz"))

    check("losses, here and without torch", float(np.abs(results["losses"] - losses[half:]).max()), 1e-4)
    check("logits, likewise", float(np.abs(results["logits"] - predict(leaves, unknown)).max()), 1e-3)
    answers = results["logits"].argmax(-1)
    check("new digits that it gets wrong", float(np.mean(answers != solutions)), 0.9 if arguments.quick else 0.1)

    picture, (curve, guesses) = figure(2)
    curve.semilogy(losses, color=LIGHT, linewidth=3, label="here")
    curve.semilogy(np.arange(half, len(rows)), results["losses"], color=DARK, linewidth=0.8, label="without torch")
    curve.set(title="Training loss", xlabel="step")
    curve.legend(frameon=False)
    show_images(guesses, unknown[:40].reshape(4, 10, 8, 8), "New digits, and what it takes them for")
    for i, (answer, solution) in enumerate(zip(answers[:40], solutions, strict=False)):
        color = DARK if answer == solution else RED
        guesses.text(i % 10 * 10 - 0.5, i // 10 * 10 - 0.5, answer, color=color, va="top", fontsize=7)
    save(picture, arguments.output)


if __name__ == "__main__":
    main()
