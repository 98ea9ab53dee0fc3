"""What `torchleaf` hands out, how it is documented, and what it imports of others."""

import ast
import inspect
import sys
from pathlib import Path

import equinox as eqx
import pytest
import torchleaf
from fresh_process import run_python

FUNCTIONS = [
    "check",
    "doctor",
    "jax_function",
    "load_state_dict",
    "stack",
    "state_dict",
    "to_jax",
    "to_jax_model",
    "to_torch",
    "to_torch_module",
    "torch_function",
    "trainable",
]
ERRORS = ["JaxCallError", "RandomnessError", "StateError", "TorchCallError"]

PACKAGE = Path(torchleaf.__path__[0])
SOURCES = [
    PACKAGE / "__init__.py",
    *sorted((PACKAGE / "interop").rglob("*.py")),
    *sorted((PACKAGE / "layers").rglob("*.py")),
]

FOR_FLAX = ("flax_collections.py", "linen.py", "nnx.py")
"""Imported by those who use Flax."""


def test_public_names():
    public = {n for n, x in vars(torchleaf).items() if not n.startswith("_") and not inspect.ismodule(x)}
    assert public == {*FUNCTIONS, *ERRORS, "JaxModule", "TorchModule"}


def test_equinox_module_is_the_default_one():
    assert torchleaf.TorchModule is torchleaf.equinox.TorchModule
    assert issubclass(torchleaf.TorchModule, eqx.Module)


def test_errors_share_a_base():
    assert issubclass(torchleaf.TorchCallError, RuntimeError)
    assert issubclass(torchleaf.StateError, torchleaf.TorchCallError)
    assert issubclass(torchleaf.RandomnessError, torchleaf.TorchCallError)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_document_every_argument(name):
    function = getattr(torchleaf, name)
    assert "**Arguments:**" in function.__doc__
    assert "**Returns:**" in function.__doc__
    _check_parameters(function)


def test_torch_module_documents_every_argument():
    cls = torchleaf.TorchModule
    for field in ("params", "frozen", "buffers", "inference"):
        assert f"- `{field}`:" in cls.__doc__
    assert "**Arguments:**" in cls.__init__.__doc__
    assert "**Arguments:**" in cls.__call__.__doc__
    assert "**Returns:**" in cls.__call__.__doc__
    assert cls.call.__doc__
    _check_parameters(cls.__init__)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_documented(name):
    assert inspect.cleandoc(vars(getattr(torchleaf, name))["__doc__"])


def _check_parameters(function):
    undocumented = [
        p for p in inspect.signature(function).parameters if p != "self" and f"`{p}`" not in function.__doc__
    ]
    assert not undocumented


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_are_relative_and_light(source):
    for module, level, lazily in _imports(source):
        top = module.split(".")[0]
        assert level > 0 or top != "torchleaf", "imports inside the package are relative"
        optional = {"flax", "optax", "transformers"} - ({"flax"} if source.name in FOR_FLAX else set())
        assert lazily or top not in optional, "optional packages are imported where they are used"


def _imports(source):
    """Each import as (module, level of a relative import, whether it happens inside a function)."""
    tree = ast.parse(source.read_text())
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    inner = {id(n) for function in functions for n in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, id(node) in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or node.names[0].name, node.level, id(node) in inner


def test_the_package_is_loaded_once():
    """pytest would import the repository root, which is the package too, under the directory's name."""
    loaded = [
        n for n, m in sys.modules.items() if (getattr(m, "__file__", None) or "").endswith("interop/primitive.py")
    ]
    assert loaded == ["torchleaf.interop.primitive"]


@pytest.mark.long
def test_import_is_light():
    """No optional package comes along, and no JAX backend is started before the user could configure it."""
    loaded = run_python(
        """
        import sys
        import torchleaf
        optional = "flax", "matplotlib", "optax", "sklearn", "transformers"
        print(*(name for name in optional if name in sys.modules))

        import jax
        jax.config.update("jax_num_cpu_devices", 3)  # an error once the backend runs
        assert jax.device_count() == 3
        """
    )
    assert loaded.split() == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["equinox", "linen", "nnx"])
@pytest.mark.parametrize(
    "statement", ["import torchleaf.{}", "from torchleaf.{} import TorchModule", "import torchleaf"]
)
def test_frameworks_are_modules_of_the_package(name, statement):
    run_python(
        f"""
        {statement.format(name)}
        import sys, torchleaf

        assert torchleaf.{name} is sys.modules["torchleaf.layers.{name}"]
        assert torchleaf.{name}.__spec__.name == "torchleaf.layers.{name}"
        """
    )
