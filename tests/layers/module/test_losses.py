"""torch's losses through `torch_function`, with labels as JAX has them (int32): values, gradients, batches."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
import torchleaf
from compare import assert_trees_close, eager_and_jit, from_torch

N, C, T = 6, 4, 8


@dataclass(frozen=True)
class Loss:
    """A loss, how to draw its arrays, and its static options."""

    name: str
    fn: Callable[..., torch.Tensor]
    arrays: Callable[[np.random.Generator], tuple[np.ndarray, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    active: tuple[int, ...] = (0,)
    """The arrays that gradients are asked for."""
    batches: bool = True
    """Whether torch.func.vmap has the rules."""
    reads_values: bool = False
    """Whether it needs `out_shape`, as gaussian_nll does, which looks for negative variances."""


def _normal(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.normal(size=shape).astype(np.float32)


def _labels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, C, N).astype(np.int32)


def _draw(*draws: Callable[[np.random.Generator], np.ndarray]) -> Callable[..., tuple[np.ndarray, ...]]:
    return lambda rng: tuple(draw(rng) for draw in draws)


def _probabilities(rng: np.random.Generator) -> np.ndarray:
    return rng.dirichlet(np.ones(C), N).astype(np.float32)


def _ctc_arrays(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    log_probs = np.log(rng.dirichlet(np.ones(C), (T, 2))).astype(np.float32)
    targets = rng.integers(1, C, (2, 3)).astype(np.int32)
    return log_probs, targets, np.array([T, T - 1], np.int32), np.array([3, 2], np.int32)


def _signs(rng: np.random.Generator) -> np.ndarray:
    return rng.choice([-1, 1], N).astype(np.int32)


def _one_hot(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2, (N, C)).astype(np.int32)


def _label_sets(rng: np.random.Generator) -> np.ndarray:
    """Up to C labels for each example, ended by -1."""
    return np.stack([np.where(np.arange(C) < rng.integers(1, C), rng.permutation(C), -1) for _ in range(N)])


def _class_weights(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.5, 2, C).astype(np.float32)


def _cosine_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(x, y)


logits, values = _normal(N, C), _draw(_normal(N, C), _normal(N, C))
classified = _draw(logits, _labels)
weighted = _draw(logits, _labels, _class_weights)
triple = _draw(logits, logits, logits)

LOSSES = [
    Loss("cross_entropy", F.cross_entropy, classified),
    Loss("cross_entropy-smoothing", F.cross_entropy, classified, {"label_smoothing": 0.1}),
    Loss("cross_entropy-ignore", F.cross_entropy, classified, {"ignore_index": 1}),
    Loss("cross_entropy-soft", F.cross_entropy, _draw(logits, _probabilities), active=(0, 1)),
    Loss(
        "cross_entropy-soft-weight-smoothing",
        F.cross_entropy,
        _draw(logits, _probabilities, _class_weights),
        {"label_smoothing": 0.2},
        active=(0, 1),
    ),
    Loss("cross_entropy-weight", F.cross_entropy, weighted),
    Loss(
        "cross_entropy-weight-ignore-smoothing", F.cross_entropy, weighted, {"ignore_index": 2, "label_smoothing": 0.1}
    ),
    Loss(
        "cross_entropy-pixels",
        F.cross_entropy,
        lambda rng: (_normal(2, C, 3, 5)(rng), rng.integers(0, C, (2, 3, 5)).astype(np.int32)),
    ),
    Loss("nll", F.nll_loss, classified),
    Loss("nll-weight-ignore", F.nll_loss, weighted, {"ignore_index": 0}),
    Loss("huber", F.huber_loss, values, {"delta": 0.5}, active=(0, 1)),
    Loss("smooth_l1", F.smooth_l1_loss, values, {"beta": 0.5}, active=(0, 1)),
    Loss("mse", F.mse_loss, values, active=(0, 1)),
    Loss(
        "mse-weight",
        lambda x, y, weight, **options: F.mse_loss(x, y, weight=weight, **options),
        lambda rng: (*values(rng), _probabilities(rng)),
        active=(0, 1),
    ),
    Loss("l1", F.l1_loss, values, active=(0, 1)),
    Loss("bce", F.binary_cross_entropy, _draw(_probabilities, _probabilities), active=(0, 1)),
    Loss("bce_with_logits", F.binary_cross_entropy_with_logits, _draw(logits, _probabilities), active=(0, 1)),
    Loss(
        "bce_with_logits-pos_weight",
        lambda x, y, pos_weight, **options: F.binary_cross_entropy_with_logits(x, y, pos_weight=pos_weight, **options),
        _draw(logits, _probabilities, _class_weights),
        active=(0, 1),
    ),
    Loss("kl_div", F.kl_div, _draw(logits, _probabilities), active=(0, 1), batches=False),
    Loss("kl_div-log_target", F.kl_div, values, {"log_target": True}, active=(0, 1), batches=False),
    Loss(
        "cosine_embedding",
        F.cosine_embedding_loss,
        lambda rng: (*values(rng), _signs(rng)),
        {"margin": 0.1},
        active=(0, 1),
    ),
    Loss("hinge_embedding", F.hinge_embedding_loss, lambda rng: (_normal(N)(rng), _signs(rng))),
    Loss(
        "margin_ranking",
        F.margin_ranking_loss,
        lambda rng: (*_draw(_normal(N), _normal(N))(rng), _signs(rng)),
        active=(0, 1),
        batches=False,
    ),
    Loss("soft_margin", F.soft_margin_loss, lambda rng: (_normal(N)(rng), _signs(rng)), batches=False),
    Loss("multi_margin", F.multi_margin_loss, classified, {"p": 2}, batches=False),
    Loss("multilabel_margin", F.multilabel_margin_loss, _draw(logits, _label_sets), batches=False),
    Loss("multilabel_soft_margin", F.multilabel_soft_margin_loss, _draw(logits, _one_hot)),
    Loss("triplet", F.triplet_margin_loss, triple, {"margin": 2.0}, active=(0, 1, 2), batches=False),
    Loss("triplet-swap", F.triplet_margin_loss, triple, {"swap": True, "p": 1.0}, active=(0, 1, 2), batches=False),
    Loss(
        "triplet_with_distance",
        F.triplet_margin_with_distance_loss,
        triple,
        {"distance_function": _cosine_distance},
        active=(0, 1, 2),
    ),
    Loss(
        "gaussian_nll",
        F.gaussian_nll_loss,
        lambda rng: (*values(rng), _probabilities(rng)),
        {"full": True},
        active=(0, 1, 2),
        batches=False,
        reads_values=True,
    ),
    Loss("poisson_nll", F.poisson_nll_loss, values, active=(0, 1)),
    Loss("poisson_nll-full", F.poisson_nll_loss, _draw(_probabilities, _one_hot), {"log_input": False, "full": True}),
    Loss("ctc", F.ctc_loss, _ctc_arrays, {"zero_infinity": True}, batches=False),
]
if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
    linear = _draw(_normal(N, 3), _normal(C, 3), _labels)
    LOSSES.append(Loss("linear_cross_entropy", F.linear_cross_entropy, linear, active=(0, 1)))

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
pytestmark = [
    pytest.mark.both_engines(every=4),
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),  # kl_div
]


def _in_torch(loss: Loss, arrays: tuple[np.ndarray, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The loss, and the gradients of its sum."""
    tensors = [torch.tensor(a) if a.dtype == np.float32 else torch.tensor(a).long() for a in arrays]
    active = [tensors[i].requires_grad_() for i in loss.active]
    value = loss.fn(*tensors, **loss.options)
    return from_torch(value), from_torch(torch.autograd.grad(value.sum(), active))


def _value_and_grad(loss: Loss, value: jax.Array) -> Callable[..., Any]:
    """The same, in JAX; `value` is what it will give."""
    out_shape = jax.ShapeDtypeStruct(value.shape, value.dtype) if loss.reads_values else None
    wrapped = torchleaf.torch_function(loss.fn, out_shape=out_shape)

    def compute(*arrays):
        def total(*arrays):
            value = wrapped(*arrays, **loss.options)
            return value.sum(), value

        grads, value = jax.grad(total, argnums=loss.active, has_aux=True)(*arrays)
        return value, grads

    return compute


READS_VALUES = (F.ctc_loss,)
"""Lengths: what `engine="xla"` refuses."""


def test_every_loss_of_torch_is_tested():
    """If this fails, a release of torch has a new loss."""
    losses = {
        name
        for name, x in vars(F).items()
        if callable(x) and not name.startswith("_") and (name.endswith(("_loss", "kl_div")) or "cross_entropy" in name)
    }
    assert losses <= {loss.fn.__name__ for loss in LOSSES}


@eager_and_jit
@every_loss
def test_value_and_gradient(loss, jit, rng, engine):
    _check(loss, jit, rng, engine)


@every_reduction
@every_loss
def test_reduction(loss, reduction, rng, engine):
    _check(replace(loss, options=loss.options | {"reduction": reduction}), jax.jit, rng, engine)


def _check(loss, jit, rng, engine):
    arrays = loss.arrays(rng)
    expected = _in_torch(loss, arrays)
    if engine == "xla" and loss.fn in READS_VALUES:
        with pytest.raises(torchleaf.TorchCallError, match=r"values.*Use engine='torch'|values.*use engine='torch'"):
            _value_and_grad(loss, expected[0])(*map(jnp.asarray, arrays))
        return
    assert_trees_close(jit(_value_and_grad(loss, expected[0]))(*map(jnp.asarray, arrays)), expected)


@every_loss
def test_vmap_of_value_and_gradient(loss, rng, engine):
    if engine == "xla" and loss.fn in READS_VALUES:
        pytest.skip("it reads values")
    batch = [loss.arrays(rng) for _ in range(3)]
    stacked = [jnp.stack(column) for column in zip(*batch, strict=True)]
    expected = [_in_torch(loss, arrays) for arrays in batch]
    compute = jax.jit(jax.vmap(_value_and_grad(loss, expected[0][0])))
    loops = not loss.batches and engine == "torch"
    with pytest.warns(UserWarning, match="runs as a loop") if loops else contextlib.nullcontext():
        actual = compute(*stacked)
    assert_trees_close(actual, jax.tree.map(lambda *rows: jnp.stack(rows), *expected))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 1}], ids=repr)
def test_vmap_with_class_weights_in_common(options, rng, engine):
    """The batch has labels of its own and shares the class weights, as in training."""
    loss = Loss("cross_entropy", F.cross_entropy, classified, options)
    batch, weights = [loss.arrays(rng) for _ in range(3)], _class_weights(rng)
    cross_entropy = torchleaf.torch_function(F.cross_entropy)
    compute = jax.vmap(jax.value_and_grad(lambda x, y, w: cross_entropy(x, y, w, **options)), (0, 0, None))
    loops = "label_smoothing" in options and engine == "torch"
    with pytest.warns(UserWarning, match="loop") if loops else contextlib.nullcontext():
        actual = compute(*(jnp.stack(column) for column in zip(*batch, strict=True)), weights)
    expected = [_in_torch(loss, (*arrays, weights)) for arrays in batch]
    assert_trees_close(actual, jax.tree.map(lambda *rows: jnp.stack(rows), *((v, g) for v, (g,) in expected)))


def test_cross_entropy_agrees_with_optax(rng):
    x, labels = (jnp.asarray(a) for a in _draw(logits, _labels)(rng))
    cross_entropy = torchleaf.torch_function(F.cross_entropy)
    expected = jax.value_and_grad(lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels).mean())(x)
    assert_trees_close(jax.value_and_grad(lambda x: cross_entropy(x, labels))(x), expected)


def test_labels_of_any_integer_type(rng):
    """What torch itself refuses (int32 labels) works, as JAX has no int64 without x64."""
    x, labels = (jnp.asarray(a) for a in _draw(logits, _labels)(rng))
    assert labels.dtype == jnp.int32
    with pytest.raises(RuntimeError, match="Int"):
        F.cross_entropy(torchleaf.to_torch(x), torchleaf.to_torch(labels))
    expected = F.cross_entropy(torchleaf.to_torch(x), torchleaf.to_torch(labels).long())
    assert_trees_close(torchleaf.torch_function(F.cross_entropy)(x, labels), from_torch(expected))


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "HuberLoss", "CTCLoss"])
def test_loss_modules(name, rng, engine):
    """Losses as modules: no parameters, the same numbers."""
    module = getattr(torch.nn, name)()
    arrays = {"CrossEntropyLoss": _draw(logits, _labels), "HuberLoss": values, "CTCLoss": _ctc_arrays}[name](rng)
    expected = module(*(torch.tensor(a) if a.dtype == np.float32 else torch.tensor(a).long() for a in arrays))
    if engine == "xla" and name == "CTCLoss":
        pytest.skip("it reads values")
    assert_trees_close(torchleaf.TorchModule(module)(*map(jnp.asarray, arrays)), from_torch(expected))
