"""`import torchleaf.nnx`: modules of this folder that users import by a name of the package's own."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FRAMEWORKS = ("equinox", "linen", "nnx")
_FOLDER, _, _ = __name__.rpartition(".")
_PACKAGE, _, _ = _FOLDER.rpartition(".")


class _Aliases(MetaPathFinder, Loader):
    """Finds `torchleaf.nnx` in `torchleaf.layers.nnx`: one module under two names."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in FRAMEWORKS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{_FOLDER}.{spec.name.rpartition('.')[2]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state  # the import system has put the alias's there


def install() -> None:
    """Let Python import the aliases."""
    sys.meta_path.append(_Aliases())
