"""Two models from transformers in all that users do with them; `test_transformers.py` has more architectures."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from module_reference import eager_and_filter_jit
from small_transformers import bert, gpt2, token_ids


@pytest.fixture
def ids():
    return token_ids(2, 7)


@pytest.fixture
def mask():
    return torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


@eager_and_filter_jit
def test_bert_gradients(jit, ids, mask):
    module = bert().eval()
    grads = jit(eqx.filter_grad(lambda m, *a: (m(*a).last_hidden_state ** 2).mean()))(
        torchleaf.TorchModule(module), from_torch(ids), from_torch(mask)
    )
    (module(ids, mask).last_hidden_state ** 2).mean().backward()
    expected = {n: from_torch(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in module.named_parameters()}
    assert_trees_close(grads.params, expected, rtol=1e-4, atol=1e-6)


@eager_and_filter_jit
def test_gpt2_logits(jit, ids):
    module = gpt2().eval()
    output = jit(lambda m, x: m(x, use_cache=False))(torchleaf.TorchModule(module), from_torch(ids))
    expected = module(ids, use_cache=False)
    assert type(output) is type(expected)
    assert_trees_close(output.logits, from_torch(expected.logits))


@eager_and_filter_jit
def test_gpt2_loss_and_gradients(jit, ids):
    """The language model's own loss, tied input and output embeddings."""
    module = gpt2().eval()
    model = torchleaf.TorchModule(module)
    assert "lm_head.weight" not in model.params
    loss, grads = jit(eqx.filter_value_and_grad(lambda m, x: m(x, labels=x, use_cache=False).loss))(
        model, from_torch(ids)
    )
    expected = module(ids, labels=ids, use_cache=False).loss
    expected.backward()
    assert_trees_close(loss, from_torch(expected))
    wanted = {name: from_torch(p.grad) for name, p in module.named_parameters()}
    assert_trees_close(grads.params, wanted, rtol=1e-4, atol=1e-6)


def test_gpt2_batches_under_vmap(ids):
    module = gpt2().eval()
    model = torchleaf.TorchModule(module)
    logits = jax.vmap(lambda row: model(row[None], use_cache=False).logits[0])(from_torch(ids))
    assert_trees_close(logits, from_torch(module(ids).logits), rtol=1e-4, atol=1e-5)


def test_bert_weights_come_back(ids):
    module = bert().eval()
    model = torchleaf.TorchModule(module)
    doubled = eqx.tree_at(lambda m: m.params, model, replace_fn=lambda p: jax.tree.map(lambda w: 2 * w, p))
    plain = torchleaf.to_torch_module(doubled)
    assert_trees_close(from_torch(plain(ids).pooler_output), doubled(from_torch(ids)).pooler_output)
    assert list(torchleaf.state_dict(model)) == list(module.state_dict())
    assert jnp.any(doubled(from_torch(ids)).pooler_output != model(from_torch(ids)).pooler_output)
