"""`python -m torchleaf check`."""

import os
import subprocess
import sys

import pytest
from torchleaf.layers.check.command import main

FACTORIES = """
import torch

def good():
    return torch.nn.Linear(3, 2), torch.ones(4, 3)

def function():
    return torch.sin, torch.ones(3)

def refused():
    return (lambda x: x[x > 0]), torch.ones(3)

def number():
    return 3

def misfit():
    return torch.nn.Linear(3, 2), torch.ones(4, 5)

pair = (torch.nn.Identity(), torch.ones(2))
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("factories", None)


@pytest.mark.long
def test_command(factories):
    """Modules of the current directory can be named."""
    command = [sys.executable, "-m", "torchleaf", "check", "factories:good"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=factories, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Linear (Equinox)\n\nok       forward")


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("factories:function", 0, "All is as in torch."),
        ("factories:pair", 0, "Identity (Equinox)"),
        ("factories:refused", 1, "Pass `out_shape=`"),
        ("factories", 2, "'factories' is no `package.module:factory`"),
        ("factories:none", 2, "factories has no 'none'; it has function, good, misfit, number, refused."),
        ("nowhere:good", 2, "There is no module 'nowhere'"),
        ("factories:number", 2, "factories:number gives int; expected a module or function, or a tuple"),
        ("factories:misfit", 2, "torch itself fails on Linear"),
    ],
)
def test_command_line(factories, capsys, name, status, said):
    assert main([name]) == status
    assert said in " ".join(capsys.readouterr().out.split())


def test_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: python -m torchleaf check") == 2


def test_a_module_that_imports_one_there_is_not(factories):
    (factories / "factories.py").write_text("import nowhere")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        main(["factories:good"])
