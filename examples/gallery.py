"""What the scripts of the gallery share: the command line, progress bars, figures, claims that are checked."""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

DARK, LIGHT, RED = "#08306b", "#9ecae1", "#cb181d"
T = TypeVar("T")


def parse_arguments(description: str | None, output: str) -> argparse.Namespace:
    """The command line: `--quick` does the same with less, in seconds, and checks as much of it as then holds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (%(default)s)")
    parser.add_argument("--output", default=output, help="where the picture goes (%(default)s)")
    return parser.parse_args()


def progress(steps: Iterable[T], name: str) -> "Iterator[tuple[T, tqdm[Any]]]":
    """The steps, with a bar on which the numbers of the moment can be shown: `bar.set_postfix(loss=...)`."""
    bar = tqdm(steps, desc=name)
    for step in bar:
        yield step, bar


def check(claim: str, value: float, limit: float) -> None:
    """Print a claim with its number; raises `RuntimeError` unless that is below the limit."""
    print(f"{claim:58}{value:12.2e}  (at most {limit:.0e})")
    if not value <= limit:  # so that NaN fails too
        raise RuntimeError(f"{claim}: {value}, more than {limit}.")


def figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A row of panels."""
    result = Figure(figsize=(4.2 * panels, 3.4), layout="constrained")
    axes = list(result.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return result, axes


def show_images(panel: Axes, images: Float[np.ndarray, "rows columns height width"], title: str) -> None:
    """A table of images, whose darkest pixels have the highest values."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=images.min())
    panel.imshow(np.concatenate(np.concatenate(padded, axis=1), axis=1), cmap="Blues")
    panel.set(title=title, xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    panel.grid(visible=False)


def save(picture: Figure, path: str) -> None:
    """Write the picture, small enough for a page."""
    picture.savefig(path, dpi=110)
    if path.endswith(".png"):
        Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{'picture':58}{path}")
