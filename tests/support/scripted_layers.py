"""Modules with parts of TorchScript, generated code, sparse or quantised tensors."""

import io
import warnings
from typing import Any

import torch
from torch import fx, nn


def scripted(module: Any) -> Any:
    """`torch.jit.script`, which is deprecated, and still about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def _traced(module: nn.Module, x: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, x)


class Scale(nn.Module):
    """A parameter, a frozen one, a buffer, a constant and a submodule."""

    def __init__(self):
        super().__init__()
        self.w, self.frozen = nn.Parameter(torch.rand(3) + 0.5), nn.Parameter(torch.rand(3), requires_grad=False)
        self.register_buffer("b", torch.rand(3))
        self.c, self.power = torch.rand(3), 2.0
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.inner(x * self.w + self.b)) * self.c**self.power + self.frozen


class Tied(nn.Module):
    """A parameter of its own is also one of the scripted part, and a plain attribute of that."""

    def __init__(self):
        super().__init__()
        self.part = scripted(Scale())
        self.w = self.part.w
        self.other = nn.Linear(3, 3)

    def forward(self, x):
        return self.other(self.part(x) * self.w)


class Closing(nn.Module):
    """A closure over a scripted part, and a scripted function."""

    def __init__(self):
        super().__init__()
        self.part = scripted(Scale())
        self.twice = scripted(_double)
        self.f = lambda x: self.twice(self.part(x)) + self.part.w

    def forward(self, x):
        return self.f(x)


def _double(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * 2


class Generated(nn.Module):
    """Compiles its generated code anew in `__getstate__`, as e3nn's modules do."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.rand(3))
        graph = fx.Graph()
        x, w = graph.placeholder("x", torch.Tensor), graph.placeholder("w", torch.Tensor)
        graph.output(graph.call_function(torch.mul, (graph.call_function(torch.sin, (x,)), w)))
        self.main = scripted(fx.GraphModule({}, graph))

    def forward(self, x):
        return self.main(x, self.w)

    def __getstate__(self):
        state = super().__getstate__().copy()
        state["_modules"] = state["_modules"].copy()
        buffer = io.BytesIO()
        torch.jit.save(self.main, buffer)
        state["code"] = buffer.getvalue()
        del state["_modules"]["main"]
        return state

    def __setstate__(self, state):
        state = state.copy()
        code = state.pop("code")
        super().__setstate__(state)
        self.main = torch.jit.load(io.BytesIO(code))


class GraphPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.traced = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))

    def forward(self, x):
        return self.traced(x) * 2


class SparseAttribute(nn.Module):
    """The adjacency of a graph."""

    def __init__(self, layout: str):
        super().__init__()
        dense = torch.tensor([[0.0, 1, 0], [0.5, 0, 0], [0, 0, 2]])
        self.adjacency = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.sparse.mm(self.adjacency, self.linear(x).mT).mT


SCRIPTED = {
    "part": lambda: nn.Sequential(nn.Linear(3, 3), scripted(Scale())),
    "nested": lambda: nn.Sequential(nn.ModuleDict({"a": scripted(nn.Sequential(Scale(), Scale()))})["a"], nn.Tanh()),
    "tied": Tied,
    "closure": Closing,
    "traced": lambda: nn.Sequential(nn.Linear(3, 3), _traced(Scale(), torch.ones(4, 3))),
    "generated": Generated,
    "graph": GraphPart,
    "sparse": lambda: SparseAttribute("coo"),
    "whole": lambda: scripted(Scale()),
}
