"""The rooms of the package, from the lowest to the highest: which way imports run, and what stands at each door."""

import ast
import graphlib
import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torchleaf

pytestmark = pytest.mark.all_cases
PACKAGE = Path(torchleaf.__path__[0])
ROOMS = [
    "interop.internals",
    "interop.wording",
    "interop.errors",
    "interop.types",
    "interop.process",
    "interop.values",
    "interop.modes",
    "interop.replay",
    "interop.calls",
    "interop.tracing",
    "interop.transport",
    "interop.xla",
    "interop.xla.ops",
    "interop.sharding",
    "interop.primitive",
    "interop.function",
    "interop.jax_calls",
    "interop.jax_function",
    "interop.doctor",
    "interop",
    "layers.module",
    "layers.aliases",
    "layers.equinox",
    "layers.equinox_tools",
    "layers.jax_module",
    "layers.flax_collections",
    "layers.linen_captured",
    "layers.linen",
    "layers.nnx",
    "layers.check",
    "layers",
    "",
]
FOLDERS = [room for room in ROOMS if room.count(".") and PACKAGE.joinpath(*room.split(".")).is_dir()]
SOURCES = sorted(path for folder in ("interop", "layers") for path in (PACKAGE / folder).rglob("*.py"))


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    """The room that a module is in, or is: the one with the longest name."""
    return max((r for r in ROOMS if f"{module}.".startswith(f"{r}." if r else "")), key=len)


def imported(path):
    """The modules of the package that a module imports, without those for annotations only."""
    tree = ast.parse(path.read_text())
    for_types = {id(n) for test in ast.walk(tree) if _is_for_types(test) for n in ast.walk(test)}
    package = [*name_of(path).split("."), ""] if path.name == "__init__.py" else name_of(path).split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in for_types:
            base = ".".join([*package[: -node.level], *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield name if _is_module(name) else base


def _is_for_types(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _is_module(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_import_goes_up(path):
    own = ROOMS.index(room_of(name_of(path)))
    above = [module for module in imported(path) if ROOMS.index(room_of(module)) > own]
    assert not above


def test_there_is_no_circle():
    graph = {name_of(path): {m for m in imported(path) if m != name_of(path)} for path in SOURCES}
    packages = {name_of(path) for path in SOURCES if path.name == "__init__.py"}
    order = graphlib.TopologicalSorter({m: needed - packages for m, needed in graph.items()}).static_order()
    assert {*order} >= graph.keys()


@pytest.mark.parametrize("room", FOLDERS)
def test_a_door_says_what_is_behind_it(room):
    """What the room is, what it may import, where to start: a module of it."""
    text = importlib.import_module(f"torchleaf.{room}").__doc__
    assert "import" in text
    start = text.partition("Start at `")[2].partition("`")[0]
    assert PACKAGE.joinpath(*room.split("."), start).is_file()


def test_there_is_one_door_to_what_others_keep_to_themselves():
    """Attributes with an underscore of torch's modules and JAX's; imports are ruff's affair (TID251)."""
    private = re.compile(r"(?<![\w\"`./])(torch|jax)(\.\w+)*\._(?!_)\w+")
    allowed = re.compile(r"torch\.ops\.aten\._\w+")  # ops by their names
    found = {}
    for path in SOURCES:
        code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith(("#", "-", '"'))]
        names = {m[0] for line in code for m in private.finditer(line) if not allowed.match(m[0])}
        if names and room_of(name_of(path)) != "interop.internals":
            found[name_of(path)] = names
    assert not found


def test_most_files_are_short():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert max(lengths.values()) <= 400
    assert sum(n <= 300 for n in lengths.values()) >= 0.95 * len(lengths)


def test_every_folder_is_installed():
    """Only listed packages are built into a wheel: the package's folder is the repository."""
    source = Path(__file__).parents[1] / "pyproject.toml"
    listed = tomllib.loads(source.read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(PACKAGE).as_posix().replace("/", ".") for path in SOURCES}
    assert {*listed} == {"torchleaf", *(f"torchleaf.{folder}" for folder in folders)}


def test_the_core_of_the_tests_is_there():
    """What runs on the newest releases, by the names of its files."""
    root = Path(__file__).parents[1]
    assert [name for name in (root / ".ci" / "core-tests").read_text().split() if not (root / name).is_file()] == []
