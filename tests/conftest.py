"""Shared fixtures: reproducible random numbers, 64-bit mode, the GPU marker."""

import collections
import gc
import zlib
from types import SimpleNamespace

import jax
import jaxtyping
import numpy as np
import pytest
import torch
import type_checks

type_checks.install()

torch.set_num_threads(1)  # the suite's processes share the cores; teams of spinning threads would slow all of them


MOST_CASES = 2
"""How many cases of one test a run takes, of the hundreds that some have; one more is long. `--whole` takes all."""


def pytest_addoption(parser):
    parser.addoption(
        "--whole", action="store_true", help=f"all cases, not {MOST_CASES} of each test, and the long ones"
    )


def pytest_collection_modifyitems(config, items):
    _mark_gpu_tests(items)
    _mark_one_case_more(items)
    left_out = set(_left_out(config.option, config.args, items))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_generate_tests(metafunc):
    """Tests that are marked `both_engines` run with each; with the one that is no default they are long ones.

    Of those that are marked `both_engines(every=n)` a run that names no file takes one in n of these.
    """
    if metafunc.definition.get_closest_marker("both_engines") is None:
        return
    others = [pytest.param("xla", marks=pytest.mark.long)]
    if metafunc.definition.get_closest_marker("torch_engine") is not None:
        others = []
    metafunc.parametrize("engine", ["torch", *others], indirect=True)


@pytest.fixture(autouse=True)
def engine(request):
    """The engine that is chosen where a test chooses none."""
    name = getattr(request, "param", "torch")
    if name == "xla":
        from engines import choose_xla

        choose_xla(request.getfixturevalue("monkeypatch"))
    return name


def pytest_collection_finish():
    """What imports made stays: collections, of which tests and torchleaf ask for many, need not look at it again."""
    gc.collect()
    gc.freeze()


def _left_out(option, args, items):
    """What a run does without that does not ask for it: by `--whole`, by name, long tests by their marker or file."""
    if option.whole or option.keyword or any("::" in arg for arg in args):
        return
    if "long" not in option.markexpr and not any(arg.endswith(".py") for arg in args):
        yield from (item for item in items if "long" in item.keywords and "slow" not in item.keywords)
    yield from _further_cases(items)
    if not any(arg.endswith(".py") for arg in args):
        yield from (
            item for item in items if _is_other_engine(item) and zlib.crc32(item.nodeid.encode()) % _every(item)
        )


def _is_other_engine(item):
    return "callspec" in vars(item) and item.callspec.params.get("engine") == "xla"


def _every(item):
    marks = [mark for mark in item.iter_markers("both_engines") if "every" in mark.kwargs]
    return marks[0].kwargs["every"] if marks else 1


def _further_cases(items):
    """The cases of large tests that only `--whole` takes."""
    for cases in _cases_of_each_test(items):
        yield from cases[MOST_CASES + any("long" not in item.keywords for item in cases) :]


def _cases_of_each_test(items):
    """Always in the same order, of all frameworks, ops and layers."""
    tests = collections.defaultdict(list)
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        if "slow" not in item.keywords and "all_cases" not in item.keywords:
            tests[item.nodeid.partition("[")[0], _is_other_engine(item)].append(item)
    return tests.values()


def _mark_one_case_more(items):
    for cases in _cases_of_each_test(items):
        if any("long" not in item.keywords for item in cases):
            for item in cases[MOST_CASES : MOST_CASES + 1]:
                item.add_marker("long")


def _mark_gpu_tests(items):
    has_gpu = torch.cuda.is_available() and any(d.platform == "gpu" for d in jax.devices())
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that both JAX and torch see"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def no_proofs(monkeypatch):
    """Without the proof of a plan, which runs a call three times more after its first run: see test_plans.py."""
    monkeypatch.setattr("torchleaf.interop.calls.choice.disagreement", lambda call, plan, tensors: None)


@pytest.fixture
def no_type_checks():
    """As users run: without the run-time type checks of the test suite, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def rng():
    """A NumPy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def x64():
    """JAX with 64-bit types for one test."""
    with jax.enable_x64(True):
        yield


HAS_REMAT3 = hasattr(jax.config, "jax_remat3") and jax.__version_info__ >= (0, 12)  # before, policies do nothing


@pytest.fixture(params=["remat", "remat3"] if HAS_REMAT3 else ["remat"])
def each_remat(request, monkeypatch):
    """A test with each implementation of `jax.checkpoint` that this JAX has, also in processes that the test starts."""
    monkeypatch.setenv("JAX_REMAT3", str(int(request.param == "remat3")))
    before = getattr(jax.config, "jax_remat3", None)
    if HAS_REMAT3:
        jax.config.update("jax_remat3", request.param == "remat3")
    yield request.param
    if HAS_REMAT3:
        jax.config.update("jax_remat3", before)


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_file():
    """Compiled programs, and the torch calls that they keep alive, are gigabytes over the whole suite.

    Graphs that wait in vain, as some do by design, are not those of the next file.
    """
    yield
    from torchleaf.interop.calls import residuals

    for number in [*residuals._graphs]:
        residuals.drop(number)
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def backward(monkeypatch):
    """The ops of backward passes alone."""
    from watching import OpLog

    log = OpLog()
    engine = torch.autograd.Variable._execution_engine
    monkeypatch.setattr(
        torch.autograd.Variable, "_execution_engine", SimpleNamespace(run_backward=log.wrap(engine.run_backward))
    )
    return log
