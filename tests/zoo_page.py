"""The page of the guide that says what works in the modules of the zoo's packages, from outcomes that lie in a folder.

`python tests/zoo_page.py FOLDER zuko x_transformers` examines packages (all that are installed: `--all`), and writes an
outcome file for each, after each module; checks whose outcomes are in it already are left out, unless `--again`.
`python tests/zoo_page.py FOLDER > docs/packages.md` writes the page from what lies there.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

Outcomes = dict[str, dict[str, Any]]
"""Of one module: check to the fields of its outcome."""

ZOO = Path(__file__).parent / "zoo"

COLUMNS = {
    "forward": "forward",
    "gradients": "gradients",
    "finite differences": "finite differences",
    "forward mode": "forward mode",
    "vmap": "vmap",
    "vmap of gradients": "vmap of gradients",
    "Hessian-vector products": "HVP",
    "training": "training",
    "state": "state",
    "keys": "keys",
    "engine='xla'": "by JAX",
}

HEAD = """\
# Packages, module by module

What `torchleaf.check` finds in modules of packages that build on torch, as their users make them, with {torch} and
JAX {jax}. Every module is an Equinox module here; each result is compared with torch's, or with finite differences.

- **yes**: as in torch, eagerly and compiled, in first and later runs.
- **slow**: likewise, and slower than it could be, for which see the notes; **loop**: `vmap` runs example by example
  inside one call.
- **refused**: an error that says what to do; **no**: not as in torch.
- Nothing: there is nothing to check, such as state, or torch cannot do it itself.

By JAX: outputs and gradients by `engine="xla"` with `strict=True`, or the op that JAX does not have.

HVP are Hessian-vector products, forward over reverse and reverse over reverse. Training compares losses and parameters
over steps of gradient descent. Your own module: [`torchleaf.check`](check.md).

```python
import jax.numpy as jnp
import torch
import torchleaf

print(torchleaf.check(torch.nn.Linear(3, 4), jnp.ones((2, 3))))
```

This page is written by `python tests/zoo_page.py FOLDER > docs/packages.md`.
"""


# --- examining -------------------------------------------------------------------------------------


def packages() -> list[str]:
    """Those of the zoo that are installed."""
    names = sorted(path.stem.removeprefix("test_") for path in ZOO.glob("test_*.py"))
    return [name for name in names if _specimens(name)]


def examine_package(folder: Path, package: str, *, again: bool) -> None:
    """Write down the outcomes of a package's modules, each as soon as it is known."""
    from zoo.driver import CHECKS, FURTHER, examine

    specimens, checks = _specimens(package), CHECKS | FURTHER
    if not specimens:
        raise SystemExit(f"{package} is not of the zoo, or not installed: {', '.join(packages())}")
    path = folder / f"{package}.json"
    known = json.loads(path.read_text()) if path.exists() and not again else {"modules": {}}
    known |= {"version": _version(package), "torch": torch.__version__, "jax": importlib.metadata.version("jax")}
    for specimen in specimens:
        outcomes = known["modules"].setdefault(specimen.name, {})
        missing = {name: check for name, check in checks.items() if name not in outcomes}
        if not missing:
            continue
        report = examine(specimen, missing)
        print(report, file=sys.stderr, flush=True)
        outcomes |= {outcome.name: asdict(outcome) for outcome in report.outcomes}
        path.write_text(json.dumps(known, indent=1))


def _specimens(package: str) -> list[Any]:
    from zoo.driver import SPECIMENS

    if importlib.util.find_spec(f"zoo.test_{package}") is None:
        return []
    importlib.import_module(f"zoo.test_{package}")
    return [] if importlib.util.find_spec(_module(package)) is None else SPECIMENS[_module(package)]


def _module(package: str) -> str:
    """What is imported, where that is not the name of the tests."""
    return {"pykan": "kan", "neuraloperator": "neuralop"}.get(package, package)


def _version(package: str) -> str:
    found = importlib.metadata.packages_distributions().get(_module(package), [package])
    return f"{found[0]} {importlib.metadata.version(found[0])}"


# --- the page --------------------------------------------------------------------------------------


def page(folder: Path) -> str:
    """The text of the page."""
    known = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not known:
        raise SystemExit(f"{folder} has no outcomes; examine packages first: `zoo_page.py {folder} zuko`.")
    versions = {f"torch {entry['torch'].partition('+')[0]}" for entry in known}
    head = HEAD.format(torch=", ".join(sorted(versions)), jax=", ".join(sorted({entry["jax"] for entry in known})))
    return "\n".join([head, *(section for entry in known for section in _sections(entry))])


def _sections(entry: dict[str, Any]) -> Iterator[str]:
    """A package: its table, and notes on what is not as it should be."""
    yield f"## {entry['version']}\n"
    yield f"| module | {' | '.join(COLUMNS.values())} |"
    yield f"|---|{'---|' * len(COLUMNS)}"
    notes: dict[str, list[str]] = {}
    for name, outcomes in entry["modules"].items():
        cells = [_cell(outcomes.get(check)) for check in COLUMNS]
        yield f"| {name} |" + "".join(f" {cell} |" if cell else " |" for cell in cells)
        for text in _notes(outcomes):
            notes.setdefault(text, []).append(name)
    yield ""
    yield from (f"- {', '.join(names)}: {text}" for text, names in notes.items())
    if notes:
        yield ""


def _cell(outcome: dict[str, Any] | None) -> str:
    if outcome is None or outcome["status"] == "n/a":
        return ""
    if outcome["status"] == "slow":
        return "loop" if "runs as a loop" in outcome["text"] else "slow"
    return {"ok": "yes", "refused": "refused"}.get(outcome["status"], "no")


def _notes(outcomes: Outcomes) -> Iterator[str]:
    """What there is to say of a module, each once, without what is said of the loop by its cell."""
    said = dict.fromkeys(
        _short(line)
        for outcome in outcomes.values()
        if outcome["status"] not in ("ok", "n/a")
        for line in _remarks(outcome)
    )
    yield from said


def _remarks(outcome: dict[str, Any]) -> list[str]:
    return outcome["text"].splitlines() if outcome["status"] == "slow" else [" ".join(outcome["text"].split())]


def _short(text: str) -> str:
    """A remark without the name of the class, and without a remedy that is the same everywhere."""
    text = re.sub(r"/\S*/site-packages/", "", text.partition(" Pass vmap_method=")[0])
    if text.startswith("vmap of "):
        reason = text.partition("inside one torch call ")[2].strip("().")
        return f"`vmap` is a loop: {reason}."
    _, _, rest = text.partition(": ")
    text = rest if text.split(":")[0].isidentifier() and "Error" not in text.split(":")[0] else text
    return text.replace("|", "\\|")


def main() -> None:
    """Examine packages, or print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("packages", nargs="*")
    parser.add_argument("--all", action="store_true", help="examine every package that is installed")
    parser.add_argument("--again", action="store_true", help="carry out checks that were carried out before, too")
    given = parser.parse_args()
    names = packages() if given.all else given.packages
    given.folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages
        for name in names:
            examine_package(given.folder, name, again=given.again)
    if not names:
        print(page(given.folder), end="")


if __name__ == "__main__":
    main()
