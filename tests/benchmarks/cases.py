"""The cases: a torch module, what one call of it takes and gives, and what is computed with it.

Weights, inputs and targets come from seeds, so that every contender, in a process of its own, computes the same.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import modules
import numpy as np
import torch
from torch import nn

Task = Literal["inference", "value_and_grad"]
Kind = Literal["module", "batched", "per_example", "hessian", "scan", "ensemble"]


@dataclass(frozen=True)
class Shape:
    """The shape of one input: floats, or token ids below `tokens`."""

    dims: tuple[int, ...]
    tokens: int = 0


@dataclass(frozen=True)
class Case:
    """One row of the table.

    - `kind`: `module`, one call on a batch; `batched`, an example at a time under `vmap`, loss and gradient of the
      mean; `per_example`, a gradient for each; `hessian` with respect to the input; `scan`, the module as a cell;
      `ensemble`, `vmap` over parameters.
    - `inputs`, `output`: shapes of one call of the module.
    - `size`: the number of examples, steps or members, for the kinds that repeat the call.
    - `active_inputs`: positions of inputs that gradients flow to, besides the parameters.
    """

    name: str
    title: str
    kind: Kind
    make: Callable[[], nn.Module]
    inputs: tuple[Shape, ...]
    output: tuple[int, ...]
    size: int = 1
    active_inputs: tuple[int, ...] = ()
    tasks: tuple[Task, ...] = ("inference", "value_and_grad")

    def module(self, seed: int = 0) -> nn.Module:
        """The module in evaluation mode, with the weights of `seed`."""
        torch.manual_seed(seed)
        return self.make().eval()

    def members(self) -> list[nn.Module]:
        """The modules of an ensemble."""
        return [self.module(seed) for seed in range(self.size)]

    def call_inputs(self) -> tuple[np.ndarray, ...]:
        """Inputs of one call."""
        rng = np.random.default_rng(0)
        return tuple(_draw(rng, shape, ()) for shape in self.inputs)

    def data(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Inputs and target of the whole computation."""
        rng = np.random.default_rng(1)
        repeated = (self.size,) if self.kind in ("batched", "per_example") else ()
        if self.kind == "scan":
            steps, carry = self.inputs
            inputs = (_draw(rng, steps, (self.size,)), np.zeros(carry.dims, np.float32))
        else:
            inputs = tuple(_draw(rng, shape, repeated) for shape in self.inputs)
        members = (self.size,) if self.kind == "ensemble" else ()
        target = rng.standard_normal((*members, *repeated, *self.output), np.float32)
        return inputs, target


def _draw(rng: Any, shape: Shape, leading: tuple[int, ...]) -> np.ndarray:
    dims = (*leading, *shape.dims)
    if shape.tokens:
        return rng.integers(0, shape.tokens, dims, np.int32)
    return rng.standard_normal(dims, np.float32)


def _mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "linear",
            "Linear(32, 16), 64 rows",
            "module",
            lambda: nn.Linear(32, 16),
            (Shape((64, 32)),),
            (64, 16),
        ),
        Case(
            "mlp",
            "MLP 784-256-256-10, 64 rows",
            "module",
            lambda: _mlp(784, 256, 256, 10),
            (Shape((64, 784)),),
            (64, 10),
        ),
        Case(
            "lstm",
            "LSTM(64, 128), 16 x 32 steps",
            "module",
            lambda: modules.Sequences(nn.LSTM(64, 128, batch_first=True)),
            (Shape((16, 32, 64)),),
            (16, 32, 128),
        ),
        Case(
            "transformer",
            "Transformer encoder 4 x 256, 8 x 128 tokens",
            "module",
            lambda: modules.transformer(layers=4, width=256, heads=8),
            (Shape((8, 128, 256)),),
            (8, 128, 256),
        ),
        Case(
            "resnet18",
            "ResNet-18, 8 x 3 x 32 x 32",
            "module",
            lambda: modules.ResNet18(classes=10),
            (Shape((8, 3, 32, 32)),),
            (8, 10),
        ),
        Case(
            "bert",
            "BERT 4 x 256 (transformers), 8 x 128 tokens",
            "module",
            lambda: modules.Bert(layers=4, width=256, heads=4, vocabulary=1000),
            (Shape((8, 128), tokens=1000),),
            (8, 128, 256),
        ),
        Case(
            "grad_vmap_linear",
            "grad(vmap): Linear(1024, 1024), batch 64",
            "batched",
            lambda: nn.Linear(1024, 1024),
            (Shape((1024,)),),
            (1024,),
            size=64,
        ),
        Case(
            "grad_vmap_cnn",
            "grad(vmap): small CNN, batch 64",
            "batched",
            modules.cnn,
            (Shape((1, 28, 28)),),
            (10,),
            size=64,
        ),
        Case(
            "per_example",
            "vmap(grad): MLP 64-128-128-10, batch 64",
            "per_example",
            lambda: _mlp(64, 128, 128, 10),
            (Shape((64,)),),
            (10,),
            size=64,
            tasks=("value_and_grad",),
        ),
        Case(
            "hessian",
            "hessian: MLP 32-64-64-1",
            "hessian",
            lambda: _mlp(32, 64, 64, 1, activation=nn.Tanh),
            (Shape((32,)),),
            (1,),
            active_inputs=(0,),
            tasks=("value_and_grad",),
        ),
        Case(
            "scan",
            "scan: GRUCell(32, 32), 8 rows, 1000 steps",
            "scan",
            lambda: nn.GRUCell(32, 32),
            (Shape((8, 32)), Shape((8, 32))),
            (8, 32),
            size=1000,
            active_inputs=(1,),
        ),
        Case(
            "ensemble",
            "vmap over 8 MLPs 64-128-128-10, 64 rows",
            "ensemble",
            lambda: _mlp(64, 128, 128, 10),
            (Shape((64, 64)),),
            (64, 10),
            size=8,
        ),
    )
}
