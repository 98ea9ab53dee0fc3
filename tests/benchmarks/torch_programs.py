"""What each kind of case computes, written in torch."""

from collections.abc import Callable, Sequence
from typing import Any

import place
import torch
from cases import Case, Task
from steps import Step
from torch.func import functional_call, grad, hessian, stack_module_state, vmap
from torch.nn.functional import mse_loss

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def step(case: Case, task: Task, compile: Compile = lambda f: f) -> Step:
    """`compile` is applied to the module, or to the smallest function around it that torch.func transforms."""
    inputs, target = case.data()
    tensors = tuple(map(place.tensor, inputs))
    return _PROGRAMS[case.kind](case, task, compile, tensors, place.tensor(target))


def _module(case: Case, task: Task, compile: Compile, inputs: Any, target: torch.Tensor) -> Step:
    module = place.module(case.module())
    call = compile(module)
    return _step(task, lambda: call(*inputs), target, dict(module.named_parameters()))


def _scan(case: Case, task: Task, compile: Compile, inputs: Any, target: torch.Tensor) -> Step:
    module = place.module(case.module())
    cell = compile(module)
    steps, initial = inputs

    def run() -> torch.Tensor:
        carry = initial
        for x in steps:
            carry = cell(x, carry)
        return carry

    return _step(task, run, target, dict(module.named_parameters()))


def _ensemble(case: Case, task: Task, compile: Compile, inputs: Any, target: torch.Tensor) -> Step:
    module = place.module(case.module())
    params, _ = stack_module_state([place.module(member) for member in case.members()])
    call = compile(vmap(lambda params, *xs: functional_call(module, params, xs), (0, *(None for _ in inputs))))
    return _step(task, lambda: call(params, *inputs), target, params)


def _step(task: Task, forward: Callable[[], torch.Tensor], target: torch.Tensor, params: Any) -> Step:
    def inference() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    def value_and_grad() -> Sequence[torch.Tensor]:
        loss = mse_loss(forward(), target)
        loss.backward()
        result = [loss.detach(), *(p.grad for p in weights)]
        for p in weights:
            p.grad = None
        return result

    weights = list(params.values())
    if task == "inference":
        return _timed(inference, lambda y: {"output": y})
    names = ["loss", *(f"grad {name}" for name in params)]
    return _timed(value_and_grad, lambda result: dict(zip(names, result, strict=True)))


def _per_example(case: Case, task: Task, compile: Compile, inputs: Any, target: torch.Tensor) -> Step:
    module = place.module(case.module()).requires_grad_(False)

    def loss(params: Any, target: torch.Tensor, *xs: torch.Tensor) -> torch.Tensor:
        return mse_loss(functional_call(module, params, xs), target)

    params = dict(module.named_parameters())
    call = compile(vmap(grad(loss), (None, 0, *(0 for _ in inputs))))
    return _timed(lambda: call(params, target, *inputs), lambda g: {f"grad {n}": x for n, x in g.items()})


def _hessian(case: Case, task: Task, compile: Compile, inputs: Any, target: torch.Tensor) -> Step:
    module = place.module(case.module()).requires_grad_(False)
    call = compile(hessian(lambda x: module(x)[0]))
    return _timed(lambda: call(*inputs), lambda h: {"hessian": h})


def _timed(start: Callable[[], Any], named: Callable[[Any], dict[str, torch.Tensor]]) -> Step:
    def wait(result: Any) -> Any:
        place.synchronise()
        return result

    return Step(start, wait, lambda result: {name: place.numbers(x) for name, x in named(result).items()})


_PROGRAMS: dict[str, Callable[..., Step]] = {
    "module": _module,
    "batched": _module,
    "per_example": _per_example,
    "hessian": _hessian,
    "scan": _scan,
    "ensemble": _ensemble,
}
