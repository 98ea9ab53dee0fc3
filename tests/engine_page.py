"""How much of torch's operator database engine='xla' computes, for docs/xla_engine.md.

`python tests/engine_page.py` prints the section of the page, which a slow test compares. An operator counts if JAX
computes a sample of it with `strict=True`; whether it does so rightly is the affair of
tests/interop/xla/test_engine_op_db.py.
"""

import re
import sys
from pathlib import Path

import jax
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))

import torchleaf
from op_database import cases, name_of, operators

REASONS = {
    r"uses (\S+), for which": "torch computes `{}`",
    r"makes a tensor whose shape depends on values": "its shapes depend on values",
    r"reads values": "it reads values",
    r"returns a tensor of layout": "it returns a tensor that is not dense",
    r"ComplexHalf|complex32": "JAX has no such dtype",
}


def verdict(op):
    """None if JAX computes an operator, a reason if not, and an empty one if there is no sample."""
    for case in cases(op, torch.float64, 1):
        if any(x.layout != torch.strided for x in case.operands):
            return ""
        arrays = [torchleaf.to_jax(x) for x in case.operands]
        key = {"key": jax.random.key(0)}
        for options in ({}, key):
            try:
                jax.eval_shape(lambda *xs, o=options: torchleaf.torch_function(case.function, **XLA)(*xs, **o), *arrays)
            except torchleaf.RandomnessError:
                continue
            except torchleaf.TorchCallError as exc:
                return reason(str(exc))
            except Exception as exc:
                return f"{type(exc).__name__}"
            return None
    return ""


def reason(message):
    """A message in a few words."""
    for words, text in REASONS.items():
        found = re.search(words, message)
        if found is not None:
            return text.format(*found.groups())
    return message.splitlines()[0]


XLA = {"engine": "xla", "strict": True}


def page():
    with jax.enable_x64(True):
        verdicts = {name_of(op): verdict(op) for op in operators(torch.float64) if not op.name.startswith("jiterator")}
    tried = {name: why for name, why in verdicts.items() if why != ""}
    others = {name: why for name, why in tried.items() if why is not None}
    versions = f"torch {torch.__version__.partition('+')[0]}, JAX {jax.__version__}"
    n_computed = len(tried) - len(others)
    yield f"Of {len(tried)} operators of torch's database with dense results, JAX alone computes {n_computed}"
    yield f"({versions}; by one sample of each, in 64 bits). The others:"
    yield ""
    yield "| operator | why not |"
    yield "|---|---|"
    yield from (f"| `{name}` | {why} |" for name, why in sorted(others.items()))


if __name__ == "__main__":
    print("\n".join(page()))
