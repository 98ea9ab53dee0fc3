"""Every class of torch.nn works, or is listed with the reason why not; docs/torch_nn.md says how.

Output, gradient and vmap of the specs that are in the catalogue too are tested with it, in
`test_every_framework_layers.py`.
"""

import contextlib
import copy
import inspect
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import layer_catalogue
import pytest
import torch
import torch_nn_page
import torch_nn_specs
import torchleaf
from compare import assert_trees_close, from_torch
from layer_catalogue import LayerSpec, looped
from module_reference import eager_and_filter_jit, snapshot, torch_gradients_of, weighted_sum
from torch_nn_specs import REFUSED, WITHOUT_FORWARD, class_name

pytestmark = [
    pytest.mark.both_engines(every=4),
    pytest.mark.filterwarnings("ignore:`NLLLoss2d` has been deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),  # once per process
]

CLASSES = {
    name: cls
    for name, cls in vars(torch.nn).items()
    if inspect.isclass(cls) and issubclass(cls, torch.nn.Module) and not name.startswith("_")
}
SPECS = [
    spec for spec in torch_nn_specs.SPECS if class_name(spec) in CLASSES
]  # some are new in newer versions of torch
DETERMINISTIC = [spec for spec in SPECS if spec not in layer_catalogue.SPECS and spec.random != "always"]

PAGE = Path(__file__).parents[3] / "docs/torch_nn.md"


def _each(specs: list[LayerSpec]):
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: spec.name)


every_deterministic_spec = _each(DETERMINISTIC)
every_stateful_spec = _each([spec for spec in SPECS if spec.stateful])
every_random_spec = _each([spec for spec in SPECS if spec.random != "never"])


@pytest.mark.torch_engine  # no call
def test_every_class_is_listed():
    """If this fails, a release of torch has a new layer: give it a spec."""
    assert {class_name(spec) for spec in SPECS} | WITHOUT_FORWARD.keys() | REFUSED.keys() == CLASSES.keys()


@pytest.mark.torch_engine  # no call
def test_page_is_up_to_date():
    """If this fails: `python tests/support/torch_nn_page.py > docs/torch_nn.md`, with the newest torch."""
    committed = PAGE.read_text().splitlines(keepends=True)
    classes = [re.match(r"\| ([A-Z]\w+) \|", line) for line in committed]
    here = [line for line, cls in zip(committed, classes, strict=True) if cls is None or cls[1] in CLASSES]
    assert "".join(here) == torch_nn_page.page()


@pytest.mark.torch_engine  # no call
@_each(SPECS)
def test_when_torch_itself_draws_and_changes_buffers(spec):
    """What the specs, and so the page, say of state and randomness."""
    module = spec.make()
    args, kwargs = spec.draw()

    def outputs(training):
        runs = [copy.deepcopy(module).train(training) for _ in range(2)]
        return [from_torch(m(*args, **kwargs)) for m in runs]

    trained = copy.deepcopy(module).train()
    trained(*args, **kwargs)
    changed = [name for name, b in trained.named_buffers() if not torch.equal(b, module.get_buffer(name))]
    assert bool(changed) == spec.stateful
    draws = tuple(mode for mode in (True, False) if not eqx.tree_equal(*outputs(mode)))
    assert draws == {"never": (), "in training": (True,), "always": (True, False)}[spec.random]


@pytest.mark.torch_engine  # no call
@pytest.mark.parametrize("name", WITHOUT_FORWARD)
def test_classes_that_compute_nothing(name):
    assert CLASSES[name].forward is torch.nn.Module.forward


def test_data_parallel_is_the_module_within():
    module = torch.nn.Linear(3, 4)
    parallel, plain = torchleaf.TorchModule(torch.nn.DataParallel(module)), torchleaf.TorchModule(module)
    of_parallel, of_plain = (jax.value_and_grad(lambda p, m=m: _call_with(m, p)) for m in (parallel, plain))
    value, grads = of_parallel(parallel.params)
    assert_trees_close(
        (value, {f"module.{k}": g for k, g in of_plain(plain.params)[1].items()}), (of_plain(plain.params)[0], grads)
    )


def _call_with(model, params):
    return jnp.sum(eqx.tree_at(lambda m: m.params, model, params)(jnp.ones(3)) ** 2)


@pytest.mark.torch_engine  # no call
@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith("Lazy")])
def test_lazy_layers_before_their_first_call(name):
    uninitialised = CLASSES[name](4, 2) if "Conv" in name else CLASSES[name](*[4] * (name == "LazyLinear"))
    with pytest.raises(TypeError, match=r"uninitialised .*Run the torch module once"):
        torchleaf.TorchModule(uninitialised)


def _in_eval(spec: LayerSpec, engine: str = "torch"):
    """In evaluation mode if training mode draws random numbers or changes buffers."""
    if engine == "xla" and class_name(spec) in ("GaussianNLLLoss", "CTCLoss"):
        pytest.skip("it reads values")
    module = spec.make().train(not spec.stateful and spec.random == "never")
    return module, torchleaf.TorchModule(module, **spec.options)


@every_deterministic_spec
def test_output(spec, engine):
    module, model = _in_eval(spec, engine)
    before = snapshot(module)
    args, kwargs = spec.draw()
    actual = model(*from_torch(args), **from_torch(kwargs))
    assert_trees_close(actual, from_torch(module(*args, **kwargs)), rtol=spec.tolerance, atol=spec.tolerance)
    assert snapshot(module) == before


@every_deterministic_spec
def test_jitted_output_and_gradients(spec, engine):
    module, model = _in_eval(spec, engine)
    args, kwargs = spec.draw()
    actual = _output_and_gradients(lambda m: m, model, args, kwargs)
    expected = from_torch(module(*args, **kwargs)), *torch_gradients_of(module, module, args, kwargs)
    assert_trees_close(actual, expected, rtol=spec.tolerance, atol=spec.tolerance)


@every_deterministic_spec
def test_vmap_and_its_gradients(spec, engine):
    module, model = _in_eval(spec, engine)
    args, kwargs = spec.draw_batch(3)
    loop = looped(module, 3)
    loops = spec.loops and engine == "torch"
    with pytest.warns(UserWarning, match="runs as a loop") if loops else contextlib.nullcontext():
        actual = _output_and_gradients(lambda m: eqx.filter_vmap(lambda *a, **k: m(*a, **k)), model, args, kwargs)
    expected = from_torch(loop(*args, **kwargs)), *torch_gradients_of(loop, module, args, kwargs)
    assert_trees_close(actual, expected, rtol=spec.tolerance, atol=spec.tolerance)


def _output_and_gradients(transform, model, args, kwargs):
    """The output, and the gradients of `weighted_sum` of it: those of the parameters and of the inexact arguments."""

    @eqx.filter_jit
    @lambda f: eqx.filter_grad(f, has_aux=True)
    def run(inputs):
        model, args, kwargs = inputs
        output = transform(model)(*args, **kwargs)
        return weighted_sum(output), output

    grads, output = run((model, *from_torch((args, kwargs))))
    assert not any(jnp.any(g) for g in jax.tree.leaves((grads[0].frozen, grads[0].buffers)))
    return output, grads[0].params, jax.tree.leaves(grads[1:])


# --- Training mode: state ----------------------------------------------------------------------


@eager_and_filter_jit
@every_stateful_spec
def test_state_in_training(spec, jit):
    """Output, gradients and new buffers are torch's; the old state and the torch module stay as they are."""
    module = spec.make().train()
    before, old = snapshot(module), {name: b.clone() for name, b in module.named_buffers()}
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module)
    args, kwargs = spec.draw()

    def loss(inputs, state):
        model, args, kwargs = inputs
        output, state = model(*args, state=state, **kwargs)
        return weighted_sum(output), (output, state)

    given = jax.tree.map(lambda x: x, state)  # Equinox lets a state be used once
    grads, (output, new_state) = jit(eqx.filter_grad(loss, has_aux=True))((model, *from_torch((args, kwargs))), given)
    actual = output, grads[0].params, jax.tree.leaves(grads[1:])
    trained, differentiated = copy.deepcopy(module), copy.deepcopy(module)
    expected = from_torch(trained(*args, **kwargs)), *torch_gradients_of(differentiated, differentiated, args, kwargs)
    assert_trees_close(actual, expected, rtol=spec.tolerance, atol=spec.tolerance)
    assert_trees_close(_buffers(model, new_state), from_torch(dict(trained.named_buffers())))
    assert_trees_close(_buffers(model, state), from_torch(old), rtol=0, atol=0)
    assert snapshot(module) == before


@every_stateful_spec
def test_training_without_state_is_an_error(spec):
    model = torchleaf.TorchModule(spec.make().train())
    args, kwargs = spec.draw()
    with pytest.raises(torchleaf.StateError):
        model(*from_torch(args), **from_torch(kwargs))


@every_stateful_spec
def test_state_of_an_ensemble(spec):
    modules = [spec.make().train() for _ in range(3)]
    models, states = zip(*(eqx.nn.make_with_state(torchleaf.TorchModule)(m) for m in modules), strict=True)
    args, kwargs = spec.draw_batch(3)

    def run(model, args, kwargs, state):
        return model(*args, state=state, **kwargs)

    outputs, new = eqx.filter_vmap(run)(
        torchleaf.stack(models), *from_torch((args, kwargs)), jax.tree.map(lambda *s: jnp.stack(s), *states)
    )
    rows = [jax.tree.map(lambda x: x[i], (args, kwargs)) for i in range(3)]
    expected = [from_torch(m(*a, **k)) for m, (a, k) in zip(modules, rows, strict=True)]
    assert_trees_close(outputs, jax.tree.map(lambda *ys: jnp.stack(ys), *expected), rtol=1e-5, atol=1e-5)
    for i, (model, module) in enumerate(zip(models, modules, strict=True)):
        buffers = _buffers(model, jax.tree.map(lambda x: x[i], new))
        assert_trees_close(buffers, from_torch(dict(module.named_buffers())))


def _buffers(model, state):
    buffers = model.module.specs
    tensors = torchleaf.state_dict(model, state)
    return from_torch({name: x for name, x in tensors.items() if buffers[name].kind == "buffers"})


# --- Training mode: random numbers -------------------------------------------------------------


def _random(spec: LayerSpec) -> torchleaf.TorchModule:
    return torchleaf.TorchModule(spec.make().train(), **spec.options)


@every_random_spec
def test_random_numbers_come_from_the_key(spec):
    model = _random(spec)
    inputs, key = from_torch(spec.draw()), jax.random.key(0)

    def run(key):
        return model(*inputs[0], key=key, **inputs[1])

    generator = torch.get_rng_state()
    first = run(key)
    assert_trees_close(eqx.filter_jit(run)(key), first)
    assert_trees_close(run(key), first, rtol=0, atol=0)
    others = [jax.tree.leaves(run(jax.random.key(seed))) for seed in range(1, 4)]
    assert any(
        not jnp.array_equal(a, b) for other in others for a, b in zip(other, jax.tree.leaves(first), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), generator)


@every_random_spec
def test_random_numbers_without_a_key_are_an_error(spec):
    args, kwargs = from_torch(spec.draw())
    with pytest.raises(torchleaf.RandomnessError):
        _random(spec)(*args, **kwargs)


@every_random_spec
def test_gradient_is_that_of_the_same_random_numbers(spec):
    """Along the gradient, the loss with the same key rises by its squared norm."""
    key = jax.random.key(0)

    @eqx.filter_jit
    def loss(inputs):
        model, args, kwargs = inputs
        return weighted_sum(model(*args, key=key, **kwargs))

    inputs = (_random(spec), *from_torch(spec.draw()))
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(inputs)
    squared_norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))
    step = 1e-3 / jnp.sqrt(squared_norm)
    there, back = (loss(eqx.apply_updates(inputs, jax.tree.map(lambda g: s * g, gradient))) for s in (step, -step))
    assert_trees_close((there - back) / (2 * step), squared_norm, rtol=2e-2)


@every_random_spec
def test_each_example_has_its_own_random_numbers(spec, engine):
    model = _random(spec)
    args, kwargs = from_torch(spec.draw_batch(3))
    keys = jax.random.split(jax.random.key(0), 3)

    def run(args, kwargs, key):
        return model(*args, key=key, **kwargs)

    loops = spec.loops and engine == "torch"
    with pytest.warns(UserWarning, match="runs as a loop") if loops else contextlib.nullcontext():
        batched = eqx.filter_jit(eqx.filter_vmap(run))(args, kwargs, keys)
    rows = [run(*jax.tree.map(lambda x: x[i] if eqx.is_array(x) else x, (args, kwargs, keys))) for i in range(3)]
    assert_trees_close(batched, jax.tree.map(lambda *ys: jnp.stack(ys), *rows))
