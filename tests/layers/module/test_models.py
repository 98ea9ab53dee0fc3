"""Two models from transformers in every framework; `test_transformers.py` has more architectures."""

import jax
import jax.numpy as jnp
import pytest
import torch
from compare import assert_trees_close, from_torch
from frameworks import FRAMEWORKS, EquinoxModel, every_framework
from small_transformers import bert, gpt2, token_ids


@pytest.fixture
def ids():
    return token_ids(2, 7)


@pytest.fixture
def mask():
    return torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


modes = pytest.mark.parametrize(
    ("framework", "jit"),
    [(EquinoxModel, False), *((framework, True) for framework in FRAMEWORKS)],
    ids=["equinox-eager", *(f"{framework.name}-jit" for framework in FRAMEWORKS)],
)
"""Eager calls of large models take seconds; what differs between the frameworks is in small ones, too."""


@pytest.mark.long
@modes
def test_bert_gradients(framework, jit, ids, mask):
    module = bert().eval()

    def loss(model, *inputs):
        return (model(*inputs).last_hidden_state ** 2).mean(), None

    gradients = framework(module).maybe_jit(lambda m, *inputs: m.gradients(loss, *inputs), jit=jit)
    grads = gradients(from_torch(ids), from_torch(mask)).weights.params
    (module(ids, mask).last_hidden_state ** 2).mean().backward()
    expected = {n: from_torch(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in module.named_parameters()}
    assert_trees_close(grads, expected, rtol=1e-4, atol=1e-6)


@modes
def test_gpt2_logits(framework, jit, ids):
    module = gpt2().eval()
    output = framework(module).maybe_jit(lambda m, x: m(x, use_cache=False), jit=jit)(from_torch(ids))
    expected = module(ids, use_cache=False)
    assert type(output) is type(expected)
    assert_trees_close(output.logits, from_torch(expected.logits))


@modes
def test_gpt2_loss_and_gradients(framework, jit, ids):
    """The language model's own loss, tied input and output embeddings."""
    module = gpt2().eval()
    model = framework(module)
    assert "lm_head.weight" not in model.weights.params

    def loss(model, x):
        return model(x, labels=x, use_cache=False).loss, None

    grads = model.maybe_jit(lambda m, x: m.gradients(loss, x), jit=jit)(from_torch(ids))
    expected = module(ids, labels=ids, use_cache=False).loss
    expected.backward()
    assert_trees_close(grads.value, from_torch(expected))
    wanted = {name: from_torch(p.grad) for name, p in module.named_parameters()}
    assert_trees_close(grads.weights.params, wanted, rtol=1e-4, atol=1e-6)


@every_framework
def test_gpt2_batches_under_vmap(framework, ids):
    module = gpt2().eval()
    logits = framework(module).vmap(lambda m, row: m(row[None], use_cache=False).logits[0])(from_torch(ids))
    assert_trees_close(logits, from_torch(module(ids).logits), rtol=1e-4, atol=1e-5)


@every_framework
def test_bert_weights_come_back(framework, ids):
    module = bert().eval()
    model = framework(module)
    doubled = model.replaced(jax.tree.map(lambda w: 2 * w, model.weights.params))
    plain = doubled.to_torch()
    assert_trees_close(from_torch(plain(ids).pooler_output), doubled(from_torch(ids)).pooler_output)
    assert list(model.state_dict()) == list(module.state_dict())
    assert jnp.any(doubled(from_torch(ids)).pooler_output != model(from_torch(ids)).pooler_output)
