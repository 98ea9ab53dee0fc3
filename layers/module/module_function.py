"""A method of a torch module as a JAX function of weights and arguments, and the changes of state it makes."""

import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, final

import jax
import torch

from ...interop.calls.scope import current as current_scope
from ...interop.errors import CapturedWriteError, ForeignTensorError, RandomnessError, StateError, TorchCallError
from ...interop.function import TorchFunction
from ...interop.modes.guard import changed, is_plain_run
from ...interop.tracing.arguments import Arguments, Filler
from ...interop.tracing.target import Target, arguments_as_operands
from ...interop.tracing.trace import Trace
from ...interop.tracing.traceable import Flat
from ...interop.types import Aval, Operand
from ...interop.values import dtypes
from .attributes import Change, put_back, stray_tensors
from .channels_last import to_flax_layout, to_torch_layout
from .gradient_hooks import hooks_of
from .originals import refuse_foreign
from .skeleton import Skeleton, SkeletonLoan, SkeletonPool

if TYPE_CHECKING:
    from .functional_module import FunctionalModule

Weights = Mapping[str, torch.Tensor]


class ModuleFunction:
    """One method of a module in one mode, as a function of weights and arguments."""

    def __init__(self, module: "FunctionalModule", method: str, pool: SkeletonPool):
        self._names = sorted(module.specs)
        self.function = TorchFunction(_Method(module, method, pool, self._names), module.options)

    def call(
        self, weights: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, key: Any, stateful: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The output, and the buffers that the call changes, by name; without `stateful` such a call is refused."""
        leading, signature = {name: weights.get(name) for name in self._names}, self.function.signature
        missing = [name for name, leaf in leading.items() if leaf is None]
        if missing:
            raise TypeError(
                f"{self.function.name}: leaf {missing[0]!r} is missing from the model. If it was taken apart, put it "
                "together again before the call, e.g. by `eqx.combine(params, static)`."
            )
        if key is not None and signature.wants_key(key, args):
            key, kwargs = None, {**kwargs, "key": key}
        output, state = self.function.apply(Arguments(args, kwargs, signature, leading), key, stateful=stateful)
        return output, {self._names[i]: x for i, x in state.items()}


@final
class _Method(Target):
    """A method, whose leading operands are the weights, sorted by name."""

    def __init__(self, module: "FunctionalModule", method: str, pool: SkeletonPool, names: Sequence[str]):
        self._module, self._method, self._pool, self._names = module, method, pool, names
        self.callable = getattr(module.skeleton, method)
        self.name = module.name if method == "forward" else f"{module.name}.{method}"
        self.key_remedy, self.is_loose = module.key_remedy, bool(hooks_of(module.skeleton))
        self._state = [i for i, name in enumerate(names) if module.specs[name].kind == "buffers"]
        self._assigned: set[int] = set()
        self._changed_later: set[int] = set()  # state operands that runs have changed, unlike all observations

    def operands(self, arguments: Arguments) -> list[Operand]:
        """Each weight in its own torch dtype, unless the user cast the leaf to another one."""
        weights = [self._weight(n, a) for n, a in zip(self._names, arguments.avals, strict=False)]
        given = arguments_as_operands(arguments)
        if self._module.computes_in_double:  # which JAX may lack, as it lacks int64
            given = [replace(x, dtype=_DOUBLE.get(x.dtype, x.dtype)) for x in given]
        return weights + given

    def _weight(self, name: str, aval: Aval) -> Operand:
        spec = self._module.specs[name]
        is_uncast = aval.dtype == dtypes.canonical(spec.dtype)
        dtype = spec.dtype if is_uncast else dtypes.to_torch_dtype(aval.dtype)
        return Operand(name, aval, dtype, is_state=spec.kind == "buffers", is_trainable=spec.kind == "params")

    def foreign(self) -> dict[int, str]:
        return self._module.foreign()

    def explained(self, failure: ForeignTensorError) -> TorchCallError:
        return refuse_foreign(self.name, failure, self._module.originals.named(), self._module.stand_ins)

    def runner(self, fill: Filler, found: Trace, *, stateful: bool) -> Flat:
        n_weights, pool = len(self._names), self._pool
        kept, channels_last = found.state, self._module.channels_last
        places = None if found.watched else sorted(self._assigned)

        def run(*tensors: torch.Tensor) -> tuple[Any, Sequence[Any]]:
            weights = tensors[:n_weights]
            args, kwargs = fill(tensors[n_weights:])
            if channels_last:
                args, kwargs = to_torch_layout((args, kwargs))
            scope = current_scope()
            loan = None if scope is None else scope.find(pool, weights)
            if isinstance(loan, SkeletonLoan):
                loan.empty()
            skeleton = loan.skeleton if isinstance(loan, SkeletonLoan) else pool.borrow()
            before = skeleton.attributes.values(places) if places is None or places else []
            versions = skeleton.attributes.versions() if found.watched else []
            skeleton.load(weights)
            try:
                output = self._run(skeleton.module)(*args, **kwargs)
            finally:
                replaced = skeleton.unload()
                changes = put_back(before)
                is_whole = not versions or skeleton.attributes.written(versions) is None
                if scope is None and is_whole:
                    pool.give_back(skeleton)
                elif scope is not None:
                    if loan is None:
                        scope.add(SkeletonLoan(pool, skeleton, weights, before))
                    skeleton.load(weights)
            if found.watched:
                self._refuse_lost(changes, skeleton.attributes.written(versions))
            if channels_last:
                output = to_flax_layout(output)
            lost = replaced.keys() - kept - found.restored
            if found.watched:
                lost = {i for i in lost if is_plain_run(weights) and changed(weights[i], replaced[i])}
            if lost:
                self.refuse_write(lost, stateful=stateful)
            return output, [replaced.get(i, weights[i]) for i in kept]

        return run

    def _refuse_lost(self, changes: Sequence[Change], written: str | None) -> None:
        """Raise if one of the attributes that changed is state, or the tensor in one was written."""
        attribute = next((change.name for change in changes if change.is_state), written)
        if attribute is not None:
            raise self._module.lost_attribute(self.name, attribute)

    def observer(self, fill: Filler) -> Flat:
        """Run once and learn which attributes are assigned."""

        def observe(*tensors: torch.Tensor) -> tuple[Any, Sequence[Any]]:
            weights = tensors[: len(self._names)]
            args, kwargs = fill(tensors[len(self._names) :])
            self._check_shapes(weights)
            skeleton = self._pool.borrow()
            if self._module.channels_last:
                args, kwargs = to_torch_layout((args, kwargs))
            output, after = self._observe(skeleton, weights, args, kwargs)
            if self._module.channels_last:
                output = to_flax_layout(output)
            self._pool.give_back(skeleton)  # one in which the forward failed is not used again
            return output, [after[i] for i in self._state]

        return observe

    def _observe(
        self, skeleton: Skeleton, weights: Sequence[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Any]]:
        """The output, and what is in the place of each weight afterwards."""
        module, inputs = skeleton.module, [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        before = skeleton.attributes.values()
        skeleton.load(weights)
        try:
            output = self._run(module)(*args, **kwargs)
        except CapturedWriteError as exc:
            skeleton.reset()
            attribute = next(stray_tensors(module, aliasing=[exc.tensor]), None)
            if attribute is None:  # a closure or a global holds it
                raise
            raise self._module.lost_attribute(self.name, attribute) from exc
        except RandomnessError as exc:
            where = _innermost_submodule(module, exc)
            raise RandomnessError(f"{exc} It was drawn in {where}.") if where else exc from None
        replaced = skeleton.unload()
        if not replaced.keys() <= {*self._state}:
            self._refuse_changes(replaced)
        attribute = next(stray_tensors(module, aliasing=inputs), None)
        if attribute is not None:
            raise TorchCallError(
                f"{self.name} keeps an argument, or a view of it, in its attribute `{attribute}`, whose memory "
                "belongs to XLA and is reused at once. Return the tensor as an output, or store `tensor.clone()`."
            )
        changes = put_back(before)
        self._refuse_lost(changes, next(stray_tensors(module, fake=True), None))
        self._assigned |= {change.place for change in changes}
        return output, [replaced.get(i, weight) for i, weight in enumerate(weights)]

    def _run(self, module: torch.nn.Module) -> Any:
        """The method; of `forward` with its hooks, as a call of the module."""
        return module if self._method == "forward" else getattr(module, self._method)

    def check(self, found: Trace, *, stateful: bool) -> Trace:
        if stateful:
            state = {*found.state, *self._changed_later} if found.watched else found.state
            return replace(found, state=tuple(sorted(state)))
        if found.state and not found.watched:
            self._refuse_changes(found.state)
        return replace(found, state=())  # values may lead past the change; it is refused when it happens

    def refuse_write(self, operands: Collection[int], *, stateful: bool) -> NoReturn:
        if not stateful:
            self._refuse_changes(operands)
        self._changed_later |= {*operands}
        names = ", ".join(f"`{self._names[i]}`" for i in sorted(operands))
        raise StateError(
            f"{self.name} changes buffer {names} for these values, but not for those that it was traced with, so that "
            "this program has no place for the change. Call it again, which traces it anew: it is known now. (Under "
            "jax.jit, call `jax.clear_caches()` before.)"
        )

    def _refuse_changes(self, weights: Iterable[int]) -> NoReturn:
        names = ", ".join(f"`{self._names[i]}`" for i in sorted(weights))
        kinds = {self._module.specs[self._names[i]].kind for i in weights}
        if kinds == {"buffers"}:
            raise StateError(
                f"{self.name} changes buffer {names} in its forward pass, which a pure function would silently lose. "
                f"{self._module.remedy}"
            )
        raise StateError(
            f"{self.name} puts another tensor in the place of its parameter {names} in the forward pass, which a pure "
            "function would silently lose. Make it a buffer (`register_buffer`) if it is state, and leave parameters "
            "to the optimizer."
        )

    def _check_shapes(self, weights: Sequence[torch.Tensor]) -> None:
        for name, weight in zip(self._names, weights, strict=True):
            spec = self._module.specs[name]
            if tuple(weight.shape) != spec.shape:
                raise TorchCallError(
                    f"{self.name}: leaf {name!r} has shape {tuple(weight.shape)}, but the torch module's is "
                    f"{spec.shape}. A stacked model is called under vmap over its leaves, e.g. "
                    "`eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(model, x)`."
                )


_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def _innermost_submodule(module: torch.nn.Module, exc: BaseException) -> str | None:
    """Which submodule raised: its dotted name and class, for errors."""
    name_of = {id(submodule): name for name, submodule in module.named_modules()}
    found = None
    for frame, _ in traceback.walk_tb(exc.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in name_of and isinstance(owner, torch.nn.Module):
            found = owner
    return (
        f"submodule `{name_of[id(found)]}` ({type(found).__name__})"
        if found is not None and name_of[id(found)]
        else None
    )
