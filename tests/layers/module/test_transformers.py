"""transformers as it is: each architecture in evaluation and training, key-value caches, models that draw numbers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from module_reference import eager_and_filter_jit, snapshot
from samples import raw_bytes
from small_transformers import BUILDERS, CACHE, cache_of, gpt2, inputs_for, llama, token_ids, wav2vec2
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

each_model = pytest.mark.parametrize("name", BUILDERS)


_jitted_call = eqx.filter_jit(lambda model, kwargs: model(**kwargs))


def _result(output):
    """The tensor a loss is computed from."""
    return output.get("logits", output.get("last_hidden_state"))


def _torch_parameter_gradients(module, inputs):
    (_result(module(**inputs)) ** 2).mean().backward()
    return {
        name: from_torch(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in module.named_parameters()
        if p.requires_grad
    }


@eager_and_filter_jit
@each_model
def test_whole_output_in_evaluation(name, jit):
    """All that the model returns by default, its cache included, in its own classes; the module is left as it was."""
    module, inputs = BUILDERS[name]().eval(), inputs_for(name)
    module(**inputs)  # transformers prepares itself on the first call
    before = snapshot(module)
    output = jit(lambda model, inputs: model(**inputs))(torchleaf.TorchModule(module), torchleaf.to_jax(inputs))
    expected = module(**inputs)
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    assert_trees_close(output, from_torch(expected), rtol=1e-4, atol=1e-5)
    assert snapshot(module) == before


@each_model
def test_hidden_states(name):
    """transformers prepares a model for them in the first call that asks for them; here that is a compiled one."""
    module, inputs = BUILDERS[name]().eval(), inputs_for(name)
    before = snapshot(module)
    output = _jitted_call(torchleaf.TorchModule(module), {**torchleaf.to_jax(inputs), "output_hidden_states": True})
    assert snapshot(module) == before
    assert_trees_close(output, from_torch(module(**inputs, output_hidden_states=True)), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("residuals", ["live", "recompute"])
@each_model
def test_parameter_gradients_in_training(name, residuals):
    module, inputs = BUILDERS[name]().train(), inputs_for(name)
    model = torchleaf.TorchModule(module, residuals=residuals)
    grads = eqx.filter_jit(eqx.filter_grad(lambda model, inputs: (_result(model(**inputs)) ** 2).mean()))(
        model, torchleaf.to_jax(inputs)
    )
    assert_trees_close(grads.params, _torch_parameter_gradients(module, inputs), rtol=1e-4, atol=1e-6)


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.long
@each_model
def test_dropout_in_training(name):
    """The same key gives the same numbers, eager and jitted; another key gives others."""
    module, inputs = BUILDERS[name](dropout=0.3).train(), torchleaf.to_jax(inputs_for(name))
    model = torchleaf.TorchModule(module)
    generator = torch.get_rng_state()

    def loss(model, key):
        return (_result(model(**inputs, key=key)) ** 2).mean()

    value_and_grad, (first, second) = eqx.filter_value_and_grad(loss), jax.random.split(jax.random.key(0))
    jitted = eqx.filter_jit(value_and_grad)
    value, grads = jitted(model, first)
    assert_trees_close((value, grads.params), _values_and_params(value_and_grad(model, first)), rtol=1e-4, atol=1e-6)
    assert_trees_close((value, grads.params), _values_and_params(jitted(model, first)), rtol=0, atol=0)
    assert jitted(model, second)[0] != value
    assert torch.equal(torch.get_rng_state(), generator)
    evaluated = eqx.nn.inference_mode(model)
    assert_trees_close(_result(evaluated(**inputs, key=first)), _result(evaluated(**inputs)))
    with pytest.raises(torchleaf.RandomnessError, match="submodule"):
        model(**inputs)


def _values_and_params(result):
    value, grads = result
    return value, grads.params


@pytest.mark.long
@each_model
def test_gradients_with_dropout_are_those_of_the_same_mask(name):
    """The forward pass that is kept and the one that runs again in the backward pass draw the same numbers."""
    module, inputs = BUILDERS[name](dropout=0.3).train(), torchleaf.to_jax(inputs_for(name))

    @eqx.filter_jit
    @eqx.filter_grad
    def gradients(model):
        return (_result(model(**inputs, key=jax.random.key(1))) ** 2).mean()

    kept, again = (
        gradients(torchleaf.TorchModule(module, residuals=residuals)).params for residuals in ("live", "recompute")
    )
    assert_trees_close(kept, again, rtol=1e-4, atol=1e-6)


# --- caches --------------------------------------------------------------------------------------


@pytest.mark.long
@eager_and_filter_jit
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_next_tokens_from_the_cache(name, jit):
    """Two pieces, the cache of one handed to the next, give what the whole gives."""
    module, ids = BUILDERS[name]().eval(), token_ids(2, 7)
    model, call = torchleaf.TorchModule(module), jit(lambda model, kwargs: model(**kwargs))
    whole, array = module(ids).logits, from_torch(ids)
    first = call(model, {"input_ids": array[:, :4]})
    before = [raw_bytes(leaf) for leaf in jax.tree.leaves(first)]
    second = call(model, {"input_ids": array[:, 4:6], CACHE: cache_of(first)})
    third = call(model, {"input_ids": array[:, 6:], CACHE: cache_of(second)})
    logits = jnp.concatenate([first.logits, second.logits, third.logits], axis=1)
    assert_trees_close(logits, from_torch(whole), rtol=1e-4, atol=1e-5)
    assert type(cache_of(third)) is DynamicCache
    assert_trees_close(cache_of(third), from_torch(cache_of(module(ids))), rtol=1e-4, atol=1e-5)
    assert [raw_bytes(leaf) for leaf in jax.tree.leaves(first)] == before


@pytest.mark.long
@pytest.mark.parametrize("name", ["T5", "Whisper"])
def test_next_token_of_a_decoder(name):
    """The encoder's output and both caches go in again."""
    module, inputs = BUILDERS[name]().eval(), inputs_for(name)
    model, arrays = torchleaf.TorchModule(module), torchleaf.to_jax(inputs)
    ids = arrays.pop("decoder_input_ids")
    first = _jitted_call(model, {**arrays, "decoder_input_ids": ids[:, :4]})
    assert type(cache_of(first)) is EncoderDecoderCache
    encoded = torchleaf.to_jax(BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state))
    again = {"encoder_outputs": encoded, CACHE: cache_of(first), "decoder_input_ids": ids[:, 4:]}
    second = _jitted_call(model, again)
    logits = jnp.concatenate([first.logits, second.logits], axis=1)
    assert_trees_close(logits, from_torch(module(**inputs).logits), rtol=1e-4, atol=1e-5)


@eager_and_filter_jit
def test_empty_cache_is_filled_anew_in_each_call(jit):
    module, cache = gpt2().eval(), DynamicCache()
    model, ids = torchleaf.TorchModule(module), token_ids(2, 5)
    call = jit(lambda model, ids, cache: model(ids, **{CACHE: cache}))
    for i in range(3):
        piece = ids[:, i : i + 2]
        output = call(model, from_torch(piece), torchleaf.to_jax(cache))
        assert_trees_close(output, from_torch(module(piece, **{CACHE: DynamicCache()})), rtol=1e-4, atol=1e-5)
    assert cache.layers == []
    call(model, from_torch(ids), cache)
    assert cache.layers == []


def test_generation_in_a_scan():
    """A cache of fixed size is the carry of `jax.lax.scan`: greedy decoding in one compiled program."""
    module, prompt = llama().eval(), token_ids(2, 4)
    model = torchleaf.TorchModule(module)

    @eqx.filter_jit
    def generate(model, prompt, cache):
        def step(carry, _):
            token, cache = carry
            output = model(token, **{CACHE: cache})
            following = output.logits[:, -1:].argmax(-1)
            return (following, cache_of(output)), token[:, 0]

        first = model(prompt, **{CACHE: cache})
        start = first.logits[:, -1:].argmax(-1), cache_of(first)
        return jax.lax.scan(step, start, length=6)[1].T

    given = torchleaf.to_jax(StaticCache(module.config, max_cache_len=12))
    tokens = generate(model, from_torch(prompt), given)
    sequence = prompt
    for _ in range(6):
        sequence = torch.cat([sequence, module(sequence).logits[:, -1:].argmax(-1)], dim=1)
    assert_trees_close(tokens, from_torch(sequence[:, 4:]))
    assert all(layer.keys is None and layer.cumulative_length == 0 for layer in given.layers)


@pytest.mark.long
def test_gradients_with_respect_to_a_cache():
    """As in prefix tuning: keys and values that no token made."""
    module, ids = gpt2().eval(), token_ids(2, 3)
    model, prefix = torchleaf.TorchModule(module), [torch.randn(2, 2, 4, 8, requires_grad=True) for _ in range(4)]
    pairs = prefix[::2], prefix[1::2]
    cache = DynamicCache(list(zip(*pairs, strict=True)))
    (module(ids, **{CACHE: cache}).logits ** 2).mean().backward()

    def loss(cache):
        return (model(from_torch(ids), **{CACHE: cache}).logits ** 2).mean()

    given = torchleaf.to_jax(DynamicCache([(k.detach(), v.detach()) for k, v in zip(*pairs, strict=True)]))
    for transform in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        grads = transform(loss)(given)
        assert type(grads) is DynamicCache
        assert_trees_close(jax.tree.leaves(grads), [from_torch(x.grad) for x in prefix], rtol=1e-4, atol=1e-7)


def test_caches_of_a_batch_under_vmap():
    module, ids = gpt2().eval(), token_ids(3, 6)
    model = torchleaf.TorchModule(module)
    first = jax.vmap(lambda row: model(row[None, :4]))(from_torch(ids))
    assert {leaf.shape for leaf in jax.tree.leaves(cache_of(first))} == {(3, 1, 2, 4, 8)}
    second = jax.vmap(lambda row, cache: model(row[None, 4:], **{CACHE: cache}).logits[0])(
        from_torch(ids), cache_of(first)
    )
    assert_trees_close(second, from_torch(module(ids).logits[:, 4:]), rtol=1e-4, atol=1e-5)


# --- wav2vec2 ------------------------------------------------------------------------------------


@pytest.mark.long
def test_wav2vec2_under_vmap_in_training():
    """In training it sets `requires_grad` on an intermediate, within whatever transformation it runs in."""
    module, inputs = wav2vec2().train(), inputs_for("wav2vec2")
    model = torchleaf.TorchModule(module, vmap_method="loop")  # torch has no batching rule for its weight norm

    def loss(model, row):
        return (model(row[None]).last_hidden_state ** 2).mean()

    values, grads = eqx.filter_vmap(eqx.filter_value_and_grad(loss), in_axes=(None, 0))(
        model, from_torch(inputs["input_values"])
    )
    assert_trees_close(values.mean(), from_torch((module(**inputs).last_hidden_state ** 2).mean()), rtol=1e-4)
    means = {name: grad.mean(0) for name, grad in grads.params.items()}
    assert_trees_close(means, _torch_parameter_gradients(module, inputs), rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_layers_dropped_at_random():
    """Its `layerdrop` branches on a random number, which decides nothing about shapes."""
    module, inputs = wav2vec2(layerdrop=0.5).train(), torchleaf.to_jax(inputs_for("wav2vec2"))
    keys = jax.random.split(jax.random.key(0), 12)

    def encode(model, key):
        return model(**inputs, key=key).last_hidden_state

    jitted = eqx.filter_jit(encode)
    model = torchleaf.TorchModule(module)
    results = [jitted(model, key) for key in keys]
    assert 1 < len({raw_bytes(x) for x in results}) <= 4  # two layers, each there or not
    assert_trees_close([encode(torchleaf.TorchModule(module), key) for key in keys[:4]], results[:4])
    grads = eqx.filter_jit(eqx.filter_grad(lambda m, key: (encode(m, key) ** 2).sum()))(model, keys[0])
    assert all(jnp.isfinite(g).all() for g in grads.params.values())
