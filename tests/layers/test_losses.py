"""torch's losses through `torch_function`, with labels as JAX has them (int32): values, gradients, batches."""

from collections.abc import Callable
from dataclasses import dataclass, field
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
    out_shape: Any = None
    """For losses that look at values, as gaussian_nll does to refuse negative variances."""


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


logits, values = _normal(N, C), _draw(_normal(N, C), _normal(N, C))

LOSSES = [
    Loss("cross_entropy", F.cross_entropy, _draw(logits, _labels)),
    Loss("cross_entropy-smoothing", F.cross_entropy, _draw(logits, _labels), {"label_smoothing": 0.1}),
    Loss("cross_entropy-ignore", F.cross_entropy, _draw(logits, _labels), {"ignore_index": 1, "reduction": "sum"}),
    Loss("cross_entropy-none", F.cross_entropy, _draw(logits, _labels), {"reduction": "none"}),
    Loss("cross_entropy-soft", F.cross_entropy, _draw(logits, _probabilities), active=(0, 1)),
    Loss("cross_entropy-weight", F.cross_entropy, lambda rng: (*_draw(logits, _labels)(rng), np.float32([1, 2, 3, 4]))),
    Loss("nll", F.nll_loss, _draw(logits, _labels)),
    Loss("huber", F.huber_loss, values, {"delta": 0.5}, active=(0, 1)),
    Loss("smooth_l1", F.smooth_l1_loss, values, {"beta": 0.5}, active=(0, 1)),
    Loss("mse", F.mse_loss, values, active=(0, 1)),
    Loss("l1", F.l1_loss, values, {"reduction": "sum"}, active=(0, 1)),
    Loss("bce_with_logits", F.binary_cross_entropy_with_logits, _draw(logits, _probabilities), active=(0, 1)),
    Loss("kl_div", F.kl_div, _draw(logits, _probabilities), {"reduction": "batchmean"}, active=(0, 1), batches=False),
    Loss(
        "cosine_embedding",
        F.cosine_embedding_loss,
        lambda rng: (*values(rng), _signs(rng)),
        {"margin": 0.1},
        active=(0, 1),
    ),
    Loss(
        "triplet",
        F.triplet_margin_loss,
        _draw(logits, logits, logits),
        {"margin": 2.0},
        active=(0, 1, 2),
        batches=False,
    ),
    Loss(
        "gaussian_nll",
        F.gaussian_nll_loss,
        lambda rng: (*values(rng), _probabilities(rng)),
        active=(0, 1, 2),
        batches=False,
        out_shape=jax.ShapeDtypeStruct((), jnp.float32),
    ),
    Loss("poisson_nll", F.poisson_nll_loss, values, active=(0, 1)),
    Loss("ctc", F.ctc_loss, _ctc_arrays, {"zero_infinity": True}, batches=False),
]

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


def _in_torch(loss: Loss, arrays: tuple[np.ndarray, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The loss, and the gradients of its sum."""
    tensors = [torch.tensor(a) if a.dtype == np.float32 else torch.tensor(a).long() for a in arrays]
    active = [tensors[i].requires_grad_() for i in loss.active]
    value = loss.fn(*tensors, **loss.options)
    return from_torch(value), from_torch(torch.autograd.grad(value.sum(), active))


def _value_and_grad(loss: Loss) -> Callable[..., Any]:
    """The same, in JAX."""
    wrapped = torchleaf.torch_function(loss.fn, out_shape=loss.out_shape)

    def compute(*arrays):
        def total(*arrays):
            value = wrapped(*arrays, **loss.options)
            return value.sum(), value

        grads, value = jax.grad(total, argnums=loss.active, has_aux=True)(*arrays)
        return value, grads

    return compute


@eager_and_jit
@every_loss
def test_value_and_gradient(loss, jit, rng):
    arrays = loss.arrays(rng)
    actual = jit(_value_and_grad(loss))(*map(jnp.asarray, arrays))
    assert_trees_close(actual, _in_torch(loss, arrays))


@every_loss
def test_vmap_of_value_and_gradient(loss, rng):
    batch = [loss.arrays(rng) for _ in range(3)]
    stacked = [jnp.stack(column) for column in zip(*batch, strict=True)]
    compute = jax.jit(jax.vmap(_value_and_grad(loss)))
    if loss.batches:
        actual = compute(*stacked)
    else:
        with pytest.warns(UserWarning, match=f"vmap of {loss.fn.__name__}.* loop"):
            actual = compute(*stacked)
    expected = [_in_torch(loss, arrays) for arrays in batch]
    assert_trees_close(actual, jax.tree.map(lambda *rows: jnp.stack(rows), *expected))


def test_cross_entropy_agrees_with_optax(rng):
    x, labels = (jnp.asarray(a) for a in _draw(logits, _labels)(rng))
    cross_entropy = torchleaf.torch_function(F.cross_entropy)
    expected = jax.value_and_grad(lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels).mean())(x)
    assert_trees_close(jax.value_and_grad(lambda x: cross_entropy(x, labels))(x), expected)


def test_labels_of_any_integer_type(rng):
    """What torch itself refuses (int32 labels) works, as JAX has no int64 without x64."""
    x, labels = (jnp.asarray(a) for a in _draw(logits, _labels)(rng))
    assert labels.dtype == jnp.int32
    with pytest.raises((RuntimeError, NotImplementedError)):
        F.cross_entropy(torchleaf.to_torch(x), torchleaf.to_torch(labels))
    expected = F.cross_entropy(torchleaf.to_torch(x), torchleaf.to_torch(labels).long())
    assert_trees_close(torchleaf.torch_function(F.cross_entropy)(x, labels), from_torch(expected))


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "HuberLoss", "CTCLoss"])
def test_loss_modules(name, rng):
    """Losses as modules: no parameters, the same numbers."""
    module = getattr(torch.nn, name)()
    arrays = {"CrossEntropyLoss": _draw(logits, _labels), "HuberLoss": values, "CTCLoss": _ctc_arrays}[name](rng)
    expected = module(*(torch.tensor(a) if a.dtype == np.float32 else torch.tensor(a).long() for a in arrays))
    assert_trees_close(torchleaf.TorchModule(module)(*map(jnp.asarray, arrays)), from_torch(expected))
