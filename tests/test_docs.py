"""The code in README, docs/ and docstrings runs, and the reference lists the whole public API."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torchleaf
from meshes import on_devices

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def run_blocks(text: str, filename: str, namespace: dict[str, object]) -> int:
    """Run the fenced Python blocks of `text` in order, in one namespace; how many there were."""
    blocks = list(FENCE.finditer(text))
    for block in blocks:
        source = re.sub(rf"^{block[1]}", "", block[2], flags=re.MULTILINE)
        line_numbers = "\n" * text[: block.start(2)].count("\n")
        exec(compile(line_numbers + source, filename, "exec"), namespace)
    return len(blocks)


WITHOUT_CODE = ("api.md", "changelog.md", "contributing.md")
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in WITHOUT_CODE)]


OF_THE_GALLERY = {"diffusers", "e3nn", "numpyro", "peft", "torch_geometric", "zuko"}
"""Packages of the extra `gallery`, which not every environment has."""


def page_case(page: Path) -> object:
    """A page, skipped where packages are not installed; their own warnings are no errors."""
    needed = OF_THE_GALLERY.intersection(re.findall(r"^(?:import|from) (\w+)", page.read_text(), re.MULTILINE))
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    skip = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
    marks = [skip, pytest.mark.filterwarnings("ignore")] if needed else []
    marks += [pytest.mark.gallery] if page.parent.name == "gallery" else []
    return pytest.param(page, marks=marks, id=page.relative_to(ROOT).as_posix())


@pytest.mark.long
@pytest.mark.all_cases
@pytest.mark.parametrize("page", [page_case(page) for page in PAGES])
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(page.read_text(), str(page), {"__name__": "__main__"}) > 0


@pytest.mark.long
def test_the_page_on_devices_with_several():
    on_devices(
        f"""
        from pathlib import Path
        from test_docs import run_blocks

        page = Path({str(ROOT / "docs/devices.md")!r})
        assert run_blocks(page.read_text(), str(page), {{"__name__": "__main__"}}) > 0
        """,
        4,
    )


# What each docstring's example takes for granted.
SETUP = {
    "check.check": "",
    "function.torch_function": "x, y = jnp.ones(3), jnp.zeros(3)",
    "jax_function.jax_function": "",
    "module.JaxModule": "",
    "equinox.TorchModule": """
        x, y = jnp.ones((64, 3)), jnp.zeros((64, 4))
        loss = lambda encoder, x, y: jnp.mean((jax.vmap(encoder)(x) - y) ** 2)
    """,
    "linen.TorchModule": "x = jnp.ones((64, 3))",
    "nnx.TorchModule": "",
    "equinox_tools.trainable": "model, optimizer = torchleaf.TorchModule(torch.nn.Linear(3, 4)), optax.adamw(1e-3)",
    "equinox_tools.stack": "make, x = lambda: torchleaf.TorchModule(torch.nn.Linear(3, 4)), jnp.ones(3)",
}


def docstrings_with_code() -> dict[str, str]:
    """File and qualified name to docstring, for whatever the package defines."""
    found = {}
    for info in pkgutil.walk_packages(torchleaf.__path__, "torchleaf."):
        if not info.name.startswith(("torchleaf.interop", "torchleaf.layers")):
            continue  # the package directory may be the repository, with tests and examples in it
        if info.name.endswith(".philox") and importlib.util.find_spec("triton") is None:
            continue  # it is for builds of torch that bring Triton
        module = importlib.import_module(info.name)
        for thing in vars(module).values():
            if not (inspect.isclass(thing) or inspect.isfunction(thing)) or thing.__module__ != info.name:
                continue
            members = vars(thing).values() if inspect.isclass(thing) else ()
            for part in (thing, *filter(inspect.isfunction, members)):
                if FENCE.search(inspect.cleandoc(part.__doc__ or "")):
                    found[f"{info.name.rpartition('.')[2]}.{part.__qualname__}"] = inspect.cleandoc(part.__doc__)
    return found


@pytest.mark.all_cases
@pytest.mark.parametrize("name", sorted(docstrings_with_code().keys() | SETUP.keys()))
def test_docstring(name):
    namespace: dict[str, object] = {}
    imports = "import equinox as eqx, jax, jax.numpy as jnp, optax, torch, torchleaf\n"
    exec(imports + inspect.cleandoc(SETUP[name]), namespace)
    run_blocks(docstrings_with_code()[name], name, namespace)


def test_reference_lists_the_public_api():
    documented = re.findall(r"^::: torchleaf\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    public = [
        n for n, x in vars(torchleaf).items() if not n.startswith("_") and (inspect.isclass(x) or inspect.isfunction(x))
    ]
    assert sorted(documented) == sorted(public)


@pytest.mark.long
def test_navigation_lists_every_page():
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))
