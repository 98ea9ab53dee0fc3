"""Torch modules for the grammar of `generated_modules.py`: writes, buffers, randomness, ways to share and combine.

Each prints what it does. Tensors have a leading batch axis and at least one more.
"""

import copy
import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Rewrite = Callable[[torch.Tensor, torch.Tensor], object]


def _set_first(x, p):
    x[..., 0] = 0


def _scale_rows(x, p):
    x[1:] *= p


def _add_twice_to_one_place(x, p):
    x[..., [0, 0]] += 1


def _through_transpose(x, p):
    x.transpose_(-1, -2).mul_(0.5).transpose_(-1, -2)


def _through_detach(x, p):
    x.detach().clamp_(-1, 1)


def _out_argument(x, p):
    with torch.no_grad():
        torch.mul(x, 0.5, out=x)


WRITES: dict[str, Rewrite] = {
    "x += p": lambda x, p: x.add_(p),
    "x.mul_(p)": lambda x, p: x.mul_(p),
    "x[..., 0] = 0": _set_first,
    "x[1:] *= p": _scale_rows,
    "x[..., [0, 0]] += 1": _add_twice_to_one_place,
    "x.relu_()": lambda x, p: F.relu_(x),
    "x.diagonal().zero_()": lambda x, p: x.diagonal(dim1=-2, dim2=-1).zero_(),
    "x.transpose_().mul_()": _through_transpose,
    "x.unsqueeze_().cos_()": lambda x, p: x.unsqueeze_(1).cos_().squeeze_(1),
    "x.copy_(tanh(x))": lambda x, p: x.copy_(torch.tanh(x)),
    "x.masked_fill_(x > 1, 0.5)": lambda x, p: x.masked_fill_(x > 1, 0.5),
    "x.detach().clamp_()": _through_detach,
    "mul(x, 0.5, out=x)": _out_argument,
}
"""Writes into `x`; `p` is a parameter as long as its last axis."""


class Write(nn.Module):
    """Returns its input after writing into it."""

    def __init__(self, features: int, write: str):
        super().__init__()
        self.write = write
        self.p = nn.Parameter(torch.randn(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        WRITES[self.write](x, self.p)
        return x

    def extra_repr(self) -> str:
        return self.write


def _assign_data(w):
    w.data.copy_(w.data.clamp(-0.5, 0.5))


def _to_unit_rows(w):
    w.div_(w.norm(dim=1, keepdim=True))


def _add_to_a_row(w):
    w[0] += 0.25


WEIGHT_WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "weight.clamp_()": lambda w: w.clamp_(-0.4, 0.4),
    "weight.data.mul_()": lambda w: w.data.mul_(0.9),
    "weight.data.copy_()": _assign_data,
    "weight[0] += 0.25": _add_to_a_row,
    "weight.t().sub_()": lambda w: w.t().sub_(0.1),
    "weight /= norm": _to_unit_rows,
    "add(weight, 1, out=weight)": lambda w: torch.add(w, 1, out=w),
}
"""Writes into a parameter, without recording gradients."""


class WritesWeight(nn.Linear):
    """A linear layer that changes its weight before it uses it."""

    def __init__(self, features_in: int, features_out: int, write: str):
        super().__init__(features_in, features_out)
        self.write = write

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            WEIGHT_WRITES[self.write](self.weight)
        return super().forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.write}"


class Buffers(nn.Module):
    """Buffers of every kind: constant, updated in place, reassigned, a counter, a ring of past values."""

    mean: torch.Tensor
    total: torch.Tensor
    calls: torch.Tensor
    history: torch.Tensor

    KINDS = ("constant", "in place", "reassigned", "counter", "ring")

    def __init__(self, features: int, kind: str, *, persistent: bool):
        super().__init__()
        self.kind = kind
        self.register_buffer("scale", 1 + torch.rand(features), persistent=persistent)
        self.register_buffer("mean", torch.zeros(features), persistent=persistent)
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("history", torch.zeros(3, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row = x.detach().flatten(0, -2).mean(0)
        if self.kind == "constant" or not self.training:
            return x * self.scale
        if self.kind == "in place":
            self.mean.mul_(0.9).add_(row, alpha=0.1)
            return x - self.mean
        if self.kind == "reassigned":
            self.total = self.total + row.sum()
            return x + torch.tanh(self.total)
        if self.kind == "ring":
            self.history[self.calls[None] % 3] = row  # an index without axes would be read as a number, by torch itself
        self.calls += 1
        return x / self.calls + self.history.mean(0)

    def extra_repr(self) -> str:
        return self.kind


class Noise(nn.Module):
    """Random numbers by other ways than dropout, in training."""

    KINDS = ("randn_like", "rand", "normal_", "bernoulli_")

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        if self.kind == "randn_like":
            return x + 0.1 * torch.randn_like(x)
        if self.kind == "rand":
            return x * (1 + torch.rand(x.shape[-1]))
        if self.kind == "normal_":
            return x + torch.empty_like(x).normal_(std=0.1)
        return x * torch.empty_like(x).bernoulli_(0.8)

    def extra_repr(self) -> str:
        return self.kind


class First(nn.Module):
    """The first of the outputs of a layer that has several."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


class SelfAttention(nn.MultiheadAttention):
    """Attention of a sequence to itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, x, x, need_weights=False)[0]


class Tokens(nn.Module):
    """An embedding of ids that its later layers may write into."""

    def __init__(self, embedding: nn.Embedding, body: nn.Module):
        super().__init__()
        self.embedding, self.body = embedding, body

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self.embedding(ids))


class Residual(nn.Module):
    """`x + f(x)`, or `f(x)` with `x` added to it in place."""

    def __init__(self, f: nn.Module, *, in_place: bool):
        super().__init__()
        self.f, self.in_place = f, in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.f(x)
        if not self.in_place:
            return x + y
        y += x
        return y

    def extra_repr(self) -> str:
        return f"in_place={self.in_place}"


class Parallel(nn.Module):
    """Branches on one input, concatenated along the last axis."""

    def __init__(self, branches: list[nn.Module]):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], -1)


class Gate(nn.Module):
    """One branch weighs the other."""

    def __init__(self, gate: nn.Module, value: nn.Module):
        super().__init__()
        self.parts = nn.ModuleDict({"gate": gate, "value": value})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.parts["gate"](x)) * self.parts["value"](x)


class Tied(nn.Module):
    """Two layers with one weight, there and back, and a parameter under a second name."""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.encode = nn.Linear(features, hidden)
        self.decode = nn.Linear(features, hidden, bias=False)
        self.decode.weight = self.encode.weight
        self.also_bias = self.encode.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.encode(x)) * self.also_bias
        return hidden @ self.decode.weight


def random_parts(module: nn.Module) -> list[nn.Module]:
    """The submodules that draw random numbers as they are set."""
    return [m for m in module.modules() if m.training and _draws(m)]


def quieted(module: nn.Module) -> nn.Module:
    """A copy with randomness switched off."""
    twin = copy.deepcopy(module)
    for part in random_parts(twin):
        part.eval()
    return twin


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    return isinstance(module, Noise | nn.RReLU)


def names_of_parts(module: nn.Module) -> set[str]:
    """What a module is made of, with the kinds of writes, buffers and noise: for the coverage of the grammar."""
    options = ((getattr(m, "write", ""), getattr(m, "kind", "")) for m in module.modules())
    return {type(m).__name__ for m in module.modules()} | set(itertools.chain.from_iterable(options)) - {""}
