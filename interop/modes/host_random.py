"""Random numbers of Python's `random` and of `numpy.random`: from the key, as torch's.

A callable that draws from their global generators needs a key. Each run seeds them by its words and puts them back as
they were, so that a forward pass that is run again for its gradient, eagerly or compiled, draws the same. The
generators are the process's own: other threads that draw meanwhile draw from the key, and runs wait for each other.
"""

import contextlib
import cProfile
import hashlib
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from ..errors import RandomnessError

_lock = threading.RLock()
_PYTHON, _NUMPY = "Python's random", "numpy.random"
_TRIES = 3
States = tuple[Any, Any]
Result = TypeVar("Result")


def is_generator(value: Any) -> bool:
    """Whether an object is a generator of Python's or NumPy's."""
    return isinstance(value, random.Random | np.random.Generator | np.random.RandomState)


def state_of(generator: Any) -> Any:
    """What decides about the numbers that come next."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state(False)


def set_state(generator: Any, state: Any) -> None:
    """Put a generator back where it was."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def is_same_state(a: Any, b: Any) -> bool:
    """Whether the same numbers come next."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same_state(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b


def _states() -> States:
    return random.getstate(), np.random.get_state(legacy=False)


def _set_states(states: States) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])


@contextlib.contextmanager
def host_generators_kept() -> Iterator[None]:
    """Puts the generators back as they were before."""
    before = _states()
    try:
        yield
    finally:
        _set_states(before)


@contextlib.contextmanager
def host_generators_seeded(words: Sequence[int]) -> Iterator[None]:
    """Within it, what draws from the generators draws from a key of these words."""
    with _lock, host_generators_kept():
        random.seed(int.from_bytes(_digest(words, "python"), "little"))
        np.random.seed(np.frombuffer(_digest(words, "numpy"), np.uint32))
        yield


def _digest(words: Sequence[int], label: str) -> bytes:
    """Both generators are of one kind: of the same seed they would draw the same."""
    return hashlib.blake2b(np.array(words, np.uint32).tobytes() + label.encode(), digest_size=16).digest()


def drawn_from(run: Callable[[], Result]) -> tuple[Result, frozenset[str]]:
    """What `run` returns, and from which generators it draws.

    Other threads may draw meanwhile, and type checkers, which look at a random item of a list: what moved is looked at
    again, more closely.
    """
    before = _states()
    try:
        result = run()
    except BaseException:
        _set_states(before)
        raise
    moved = _moved(before, _states())
    drawn = {_PYTHON} if _PYTHON in moved and _draws_from_pythons(run) else set()
    if _NUMPY in moved and _moves(run, _NUMPY):
        drawn.add(_NUMPY)
    if drawn:
        _set_states(before)
    return result, frozenset(drawn)


def _draws_from_pythons(run: Callable[[], Any]) -> bool:
    """Whether a run draws from Python's generator: in this thread, and not to check types."""
    callers: list[str] = []

    def note(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__self__", None) is _generator and function.__name__ in _DRAWS:
            while frame.f_code.co_filename == random.__file__ and frame.f_back is not None:
                frame = frame.f_back
            callers.append(frame.f_code.co_filename)

    with _profiled(note):
        _end_of(run)
    if callers:
        return not all(name.startswith("<@beartype") for name in callers)
    return _moves(run, _PYTHON)  # by calls that cannot be seen, or another thread does


@contextlib.contextmanager
def _profiled(note: Callable[[Any, str, Any], None]) -> Iterator[None]:
    """Within it, `note` is this thread's profile function; a profiler of the user's pauses."""
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        if isinstance(before, cProfile.Profile):  # no Python function
            sys.setprofile(None)
            before.enable()
        else:
            sys.setprofile(before)


_generator = random.seed.__self__  # pyright: ignore[reportFunctionMemberAccess]
_DRAWS = ("random", "getrandbits")
"""What all other methods of it call."""


def _moves(run: Callable[[], Any], generator: str) -> bool:
    """Whether two runs from the same state leave a generator in the same other state."""
    start = _end_of(lambda: None)
    for _ in range(_TRIES):
        first, second = _end_of(run), _end_of(run)
        if generator not in _moved(start, first):
            return False
        if generator not in _moved(first, second):
            return True
    return False  # another thread draws all the time


def _end_of(run: Callable[[], Any]) -> States:
    """Where a run leaves the generators, from the same state each time."""
    with host_generators_seeded((0,)):
        with contextlib.suppress(Exception):  # other numbers may lead to other errors
            run()
        return _states()


def _moved(before: States, after: States) -> frozenset[str]:
    names = (_PYTHON, _NUMPY)
    return frozenset(n for n, a, b in zip(names, before, after, strict=True) if not is_same_state(a, b))


def refuse_host_draws(name: str, generators: frozenset[str], remedy: str) -> RandomnessError:
    """The error for a callable that draws from the generators without a key."""
    return RandomnessError(
        f"{name} draws random numbers ({' and '.join(sorted(generators))}) but was given no key. {remedy}, or switch "
        "it off (in transformers, `apply_spec_augment=False`)."
    )
