"""Models from transformers: the output class, compiled calls and gradients, unchanged model code."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from module_reference import eager_and_filter_jit, snapshot

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its imports
    import transformers

VOCABULARY = 50


def _bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config).eval()


def _gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture
def ids():
    return torch.randint(VOCABULARY, (2, 7))


@pytest.fixture
def mask():
    return torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


@eager_and_filter_jit
def test_bert_returns_its_output_class(jit, ids, mask):
    module = _bert()
    before = snapshot(module)
    output = jit(lambda m, *a: m(*a))(torchleaf.TorchModule(module), from_torch(ids), from_torch(mask))
    expected = module(ids, mask)
    assert type(output) is type(expected)
    assert list(output.keys()) == list(expected.keys())
    assert_trees_close(output.last_hidden_state, from_torch(expected.last_hidden_state))
    assert_trees_close(output["pooler_output"], from_torch(expected.pooler_output))
    assert snapshot(module) == before


@eager_and_filter_jit
def test_bert_gradients(jit, ids, mask):
    module = _bert()
    grads = jit(eqx.filter_grad(lambda m, *a: (m(*a).last_hidden_state ** 2).mean()))(
        torchleaf.TorchModule(module), from_torch(ids), from_torch(mask)
    )
    (module(ids, mask).last_hidden_state ** 2).mean().backward()
    expected = {n: from_torch(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in module.named_parameters()}
    assert_trees_close(grads.params, expected, rtol=1e-4, atol=1e-6)


def test_bert_with_hidden_states_and_attentions(ids):
    """Options are static keywords; tuples inside the output class. transformers prepares itself on the first call."""
    module = _bert()
    module(ids, output_hidden_states=True)
    output = eqx.filter_jit(torchleaf.TorchModule(module))(from_torch(ids), output_hidden_states=True)
    expected = module(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert_trees_close(output.hidden_states, from_torch(expected.hidden_states))


@eager_and_filter_jit
def test_gpt2_logits(jit, ids):
    module = _gpt2()
    output = jit(lambda m, x: m(x, use_cache=False))(torchleaf.TorchModule(module), from_torch(ids))
    expected = module(ids, use_cache=False)
    assert type(output) is type(expected)
    assert_trees_close(output.logits, from_torch(expected.logits))


def test_gpt2_cache_cannot_leave_torch(ids):
    """By default the model returns a cache object; the error says where it is."""
    with pytest.raises(
        torchleaf.TorchCallError, match=r"GPT2LMHeadModel returns a .*DynamicCache at .*past_key_values"
    ):
        torchleaf.TorchModule(_gpt2())(from_torch(ids))


@eager_and_filter_jit
def test_gpt2_loss_and_gradients(jit, ids):
    """The language model's own loss, tied input and output embeddings."""
    module = _gpt2()
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
    module = _gpt2()
    model = torchleaf.TorchModule(module)
    logits = jax.vmap(lambda row: model(row[None], use_cache=False).logits[0])(from_torch(ids))
    assert_trees_close(logits, from_torch(module(ids).logits), rtol=1e-4, atol=1e-5)


def test_bert_weights_come_back(ids):
    module = _bert()
    model = torchleaf.TorchModule(module)
    doubled = eqx.tree_at(lambda m: m.params, model, replace_fn=lambda p: jax.tree.map(lambda w: 2 * w, p))
    plain = torchleaf.to_torch_module(doubled)
    assert_trees_close(from_torch(plain(ids).pooler_output), doubled(from_torch(ids)).pooler_output)
    assert list(torchleaf.state_dict(model)) == list(module.state_dict())
    assert jnp.any(doubled(from_torch(ids)).pooler_output != model(from_torch(ids)).pooler_output)
