"""Lines of a user's code, for errors."""

import os
import sys
import traceback
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import jax
import torch


def line_of(exc: BaseException) -> str | None:
    """The innermost line of a user's code among those that led to an exception: `file:line`, and what stands there."""
    return _innermost(traceback.extract_tb(exc.__traceback__))


def line_here(outermost: str) -> str | None:
    """The same of code that is running below a file: a line of a user's or, if there is none, of torch's modules."""
    frames = traceback.extract_stack()
    first = max((i for i, f in enumerate(frames) if f.filename == outermost), default=0)
    return _innermost(frames[first:]) or _shown([f for f in frames[first:] if f.filename.startswith(_MODULES)])


def asking() -> tuple[FrameType | None, bool]:
    """Who wants a bool or a number of a size: the innermost frame that is no method of torch's symbols, and whether its
    own code does, and not an op that it calls."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith(_OF_SYMBOLS):
        frame = frame.f_back
    by_itself = False
    while frame is not None and frame.f_code.co_filename.endswith(_OF_SYMBOLS):
        by_itself |= frame.f_code.co_filename == torch.__file__
        frame = frame.f_back
    return frame, by_itself


def is_users(filename: str) -> bool:
    """Whether a file is none of torch's, JAX's and ours."""
    return not filename.startswith((*_LIBRARIES, "<"))


def _innermost(frames: Iterable[traceback.FrameSummary]) -> str | None:
    return _shown([f for f in frames if is_users(f.filename)])


def _shown(frames: list[traceback.FrameSummary]) -> str | None:
    return f"{frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)" if frames else None


_PACKAGE = Path(__file__).parents[2]
_TORCH = Path(torch.__file__).parent
_MODULES = f"{_TORCH / 'nn'}{os.sep}"
_OF_SYMBOLS = (torch.__file__, "sym_node.py", "symbolic_shapes.py")
"""Methods of torch's symbols; those in the first file are there for Python's code, and ops ask without them."""
_WRAPPERS = ("jaxtyping", "beartype", "equinox", "flax", "numpy")
_FOLDERS = (
    _TORCH,
    Path(jax.__file__).parent,
    _PACKAGE / "interop",
    _PACKAGE / "layers",
    *(Path(spec.origin).parent for spec in map(find_spec, _WRAPPERS) if spec and spec.origin),
)
_LIBRARIES = tuple(f"{folder}{os.sep}" for folder in _FOLDERS)
