"""A target at one signature: traced, and made a call."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import jax
import torch
from jax.core import Tracer

from ..errors import ForeignTensorError, TorchCallError
from ..internals.transforms import without_transforms
from ..modes.kernels import COMPILED, NONE, compiled_code
from ..modes.random import key_operand
from ..types import Aval, CallOptions, Operand
from ..values.arrays import array_to_torch
from .arguments import Arguments
from .examples import Example, made_examples
from .keys import with_key
from .specialized import Specialized
from .target import Target
from .trace import Trace, trace
from .traceable import Traceable


def specialize(
    target: Target,
    options: CallOptions,
    arguments: Arguments,
    key: Any,
    device: torch.device,
    *,
    stateful: bool,
    refuse_write: Callable[[Collection[int]], NoReturn],
) -> Specialized:
    """What a target does with arguments of these shapes and dtypes, as a call.

    **Arguments:**

    - `target`, `options`: what is called, and how.
    - `arguments`: of one call; that of others differ in values.
    - `key`: a JAX PRNG key like the one it is called with; None without.
    - `device`: where it is likely to run.
    - `stateful`: whether the caller keeps new values of state.
    - `refuse_write`: called where state changes that did not while it was traced.

    **Raises:** `TypeError` for arguments that do not fit the signature, `torchleaf.TorchCallError` for a target that
    cannot be called.
    """
    traced = traceable(target, arguments, key, device, explores=stateful)
    _refuse_symbols(traced)
    examples = functools.partial(_examples, arguments, options.example_args, traced)
    found = target.check(trace_of(target, traced, options.out_shape, examples), stateful=stateful)
    found = replace(found, fused_kernels=found.fused_kernels | compiled_code(target.callable))
    run = target.runner(arguments.filler(), found, stateful=stateful)
    if found.random:  # ops in compiled code cannot be seen
        run = with_key(run, kernels=found.fused_kernels & {COMPILED}, host=bool(found.host_random))
    elif key is not None:
        traced = traced.without_key()
    return Specialized(run, traced, found, options, is_loose=target.is_loose, refuse_write=refuse_write)


def traceable(target: Target, arguments: Arguments, key: Any, device: torch.device, *, explores: bool) -> Traceable:
    """A target with the operands of a call, of which the last one is a key if one is given."""
    arguments.check_signature()
    operands, function = target.operands(arguments), target.observer(arguments.filler())
    if key is not None:
        words = key_operand(key, target.name)
        operands.append(Operand("key", Aval(words.shape, words.dtype), torch.uint32))
        function = with_key(function, kernels=NONE)
    return Traceable(
        function,
        target.name,
        operands,
        device,
        explores=explores and any(x.is_state for x in operands),
        has_key=key is not None,
        key_remedy=target.key_remedy,
        foreign=target.foreign(),
    )


def trace_of(
    target: Target,
    traced: Traceable,
    out_shape: Any,
    examples: Callable[[], Iterable[Example]],
    answers: Sequence[Any] = (),
) -> Trace:
    """What a target does; where it reads values of fake tensors, with these `answers`."""
    try:
        with without_transforms():  # torch.func may have called JAX, which calls torch
            return trace(traced, out_shape=out_shape, examples=examples, answers=answers)
    except ForeignTensorError as exc:
        raise target.explained(exc) from exc


def _examples(arguments: Arguments, example_args: Sequence[Any] | None, traced: Traceable) -> Iterator[Example]:
    """Values to run the callable on: the arguments if they are not traced, `example_args`, or made ones."""
    operands, is_given = arguments.operands, not any(map(_is_traced, arguments.operands))
    if example_args is not None and not is_given:
        operands, is_given = _example_operands(arguments, example_args, traced.name), True
    known = [None if _is_traced(x) else _values(x, o.dtype) for x, o in zip(operands, traced.operands, strict=False)]
    specs = traced.specs
    known += [functools.partial(torch.zeros, *spec[:1], dtype=spec[1]) for spec in specs[len(known) :]]  # any key
    if is_given:
        yield Example(lambda: [make() for make in known if make is not None], is_given=True)
        known = [*known[: arguments.n_leading], *(None for _ in known[arguments.n_leading :])]
    yield from made_examples(specs, known, arguments.n_leading)


def _example_operands(arguments: Arguments, example_args: Sequence[Any], name: str) -> list[Any]:
    with jax.ensure_compile_time_eval():
        example = Arguments(tuple(example_args), {}, arguments.signature)
    if example.avals != arguments.avals:
        raise TorchCallError(
            f"{name} is called with {_shapes(arguments)}, but example_args are {_shapes(example)}. "
            "Give example_args of the shapes and dtypes it is called with, or `out_shape`."
        )
    return example.operands


def _refuse_symbols(traced: Traceable) -> None:
    for operand in traced.operands:
        if not all(isinstance(n, int) for n in operand.aval.shape):
            raise TorchCallError(
                f"{traced.name}: argument {operand.name} has the symbolic shape {operand.aval.shape}, and torch "
                "computes with sizes that are known. Use engine='xla', or export with such sizes, once for each."
            )


def _is_traced(operand: Any) -> bool:
    return isinstance(operand, Tracer)


def _values(operand: Any, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """What makes a tensor of an operand's values."""

    def make() -> torch.Tensor:
        with jax.ensure_compile_time_eval():
            return array_to_torch(operand, copy=True).to(dtype)

    return make


def _shapes(arguments: Arguments) -> str:
    return "(" + ", ".join(f"{a.dtype}{list(a.shape)}" for a in arguments.avals) + ")"
