"""Applications of autograd functions are heard, by whatever `apply`, on whichever thread, and nothing stays behind."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torchleaf.interop.modes.function_applies import applications_heard_by

pytestmark = pytest.mark.all_cases


class WithContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor=3.0):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class Inherits(WithContext):
    pass


class SetUpAfter(torch.autograd.Function):
    @staticmethod
    def forward(x, factor):
        return x * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.factor = inputs

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class OfTheClass(torch.autograd.Function):
    @classmethod
    def forward(cls, ctx, x, factor):
        ctx.factor = factor
        return x * factor, factor

    @classmethod
    def backward(cls, ctx, gradient, _):
        return gradient * ctx.factor, None


_within = WithContext.apply


class Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return _within(x, factor) + WithContext.apply(x, 0.0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


FUNCTIONS = (WithContext, Inherits, SetUpAfter, OfTheClass, Nested)
BOUND = {cls: cls.apply for cls in FUNCTIONS}
APPLY_OF = {"looked up": lambda cls: cls.apply, "bound before": BOUND.get}
bound_or_not = pytest.mark.parametrize("apply_of", APPLY_OF.values(), ids=APPLY_OF)


def _hear(heard):
    def listener(cls, args, kwargs, run):
        heard.append((cls, len(args), args[1:], torch.is_grad_enabled()))
        return run(*args, **kwargs)

    return applications_heard_by(listener)


def _gradient(apply, x, *factor):
    y = apply(x, *factor)
    y = y[0] if isinstance(y, tuple) else y
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), gradient


@bound_or_not
@pytest.mark.parametrize("cls", FUNCTIONS)
def test_each_is_heard_once(cls, apply_of):
    x, heard, before = torch.arange(3.0, requires_grad=True), [], {**vars(cls)}
    with _hear(heard):
        for _ in range(2):
            y, gradient = _gradient(apply_of(cls), x, 2.0)
            assert torch.equal(y, 2 * x)
            assert torch.equal(gradient, torch.full((3,), 2.0))
        with torch.no_grad():
            apply_of(cls)(x, 2.0)
    inner = [(WithContext, 2, (factor,), False) for factor in (2.0, 0.0)] if cls is Nested else []
    assert heard == [(cls, 2, (2.0,), True), *inner] * 2 + [(cls, 2, (2.0,), False), *inner]
    _gradient(apply_of(cls), x, 2.0)
    assert len(heard) == 3 * (1 + len(inner))  # no more
    assert {**vars(cls)} == before


@bound_or_not
def test_defaults_are_what_they_were(apply_of):
    x, heard = torch.arange(3.0, requires_grad=True), []
    with _hear(heard):
        y = apply_of(WithContext)(x)
    assert torch.equal(y, 3 * x)
    assert [n for _, n, *_ in heard] == [1]


@bound_or_not
def test_an_application_that_fails(apply_of):
    x, heard = torch.arange(3.0, requires_grad=True), []
    with _hear(heard):
        with pytest.raises(TypeError):
            apply_of(WithContext)(x, 1.0, 2.0, 3.0)
        with pytest.raises(RuntimeError):
            apply_of(SetUpAfter)(x, torch.ones(2))
        _gradient(apply_of(WithContext), x, 2.0)
    assert [cls for cls, *_ in heard][-1] is WithContext
    before = len(heard)
    _gradient(apply_of(WithContext), x, 2.0)
    _gradient(apply_of(SetUpAfter), x, 2.0)
    assert len(heard) == before


@bound_or_not
def test_another_result_can_take_its_place(apply_of):
    with applications_heard_by(lambda cls, args, kwargs, run: run(args[0] + 1, 2.0)):
        assert torch.equal(apply_of(WithContext)(torch.arange(3.0), 5.0), torch.tensor([2.0, 4.0, 6.0]))


@bound_or_not
def test_threads_that_overlap(apply_of):
    """Each hears its own, and those that listen to none go on."""
    begin = threading.Barrier(4)

    def run(number):
        x, heard = torch.arange(3.0, requires_grad=True), []
        begin.wait()
        for _ in range(200):
            if number % 2:
                _gradient(apply_of(SetUpAfter), x, float(number))
                continue
            with _hear(heard):
                _gradient(apply_of(SetUpAfter), x, float(number))
        return {(cls, args) for cls, _, args, _ in heard}, len(heard)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    assert found == [({(SetUpAfter, (float(n),))}, 200) if n % 2 == 0 else (set(), 0) for n in range(4)]
