"""`JaxModule` of every kind of model: names, training, state, modes, copies, against torch and JAX."""

import copy
import io
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
import torch
import torchleaf
from flax import linen, nnx
from jax_models import KEY, NNXCNN, Attention, LinenCNN, rnn, rnn_params
from torch import nn


def linen_cnn():
    module = LinenCNN()
    return torchleaf.JaxModule(module, module.init(KEY, jnp.ones((2, 6, 6, 1)), False))


MODELS = {
    "equinox": (lambda: torchleaf.JaxModule(Attention(KEY)), (5, 8)),
    "linen": (linen_cnn, (2, 6, 6, 1)),
    "nnx": (lambda: torchleaf.JaxModule(NNXCNN(nnx.Rngs(0))), (2, 6, 6, 1)),
    "function": (lambda: torchleaf.JaxModule(rnn, rnn_params()), (5, 8)),
}
each_model = pytest.mark.parametrize("name", MODELS)


def made(name):
    make, shape = MODELS[name]
    return make(), torch.randn(shape)


NAMES = {
    "equinox": {"attention.query_proj.weight", "norms.1.bias", "mlp.layers.0.weight"},
    "linen": {"Conv_0.kernel", "BatchNorm_0.scale", "Dense_0.bias"},
    "nnx": {"conv.kernel", "norm.scale", "head.bias"},
    "function": {"hidden", "input", "bias"},
}
BUFFERS = {
    "equinox": set(),
    "linen": {"batch_stats.BatchNorm_0.mean", "batch_stats.BatchNorm_0.var"},
    "nnx": {"norm.mean", "norm.var"},
    "function": set(),
}


@pytest.mark.long
@each_model
def test_names(name):
    model, _ = made(name)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert NAMES[name] <= parameters.keys()
    assert buffers.keys() == BUFFERS[name]
    assert model.state_dict().keys() == parameters.keys() | buffers.keys()
    assert all(p.requires_grad and p.is_leaf for p in parameters.values())


def jax_call(name, given, x):
    """The model in evaluation mode, called by JAX."""
    if name == "linen":
        module, variables = given
        return module.apply(variables, x, False)
    if name == "function":
        return given[0](given[1], x)
    if name == "nnx":
        given.eval()
    return given(x)


@pytest.mark.long
@each_model
def test_values_and_gradients_are_jaxs(name):
    model, x = made(name)
    model.eval()
    x.requires_grad_()
    out = model(x)
    out.square().sum().backward()
    x_jax = torchleaf.to_jax(x.detach())
    expected = jax_call(name, torchleaf.to_jax_model(model), x_jax)
    torch.testing.assert_close(out.detach(), torchleaf.to_torch(expected), rtol=1e-4, atol=1e-5)

    def loss(weights, x):
        given = model._jax.kind.model(weights)
        return jnp.sum(jax_call(name, given, x) ** 2)

    weights = torchleaf.to_jax({k: v.detach().clone() for k, v in model.state_dict().items()})
    floats = {k: v for k, v in weights.items() if k in dict(model.named_parameters())}
    rest = {k: v for k, v in weights.items() if k not in floats}
    grads, grad_x = jax.grad(lambda w, x: loss({**w, **rest}, x), (0, 1))(floats, x_jax)
    torch.testing.assert_close(x.grad, torchleaf.to_torch(grad_x), rtol=1e-3, atol=1e-4)
    for k, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, torchleaf.to_torch(grads[k]), rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_training_is_optaxs():
    """The same ten steps of Adam, by torch.optim and by optax."""
    jax_model = Attention(KEY)
    model = torchleaf.JaxModule(jax_model)
    x = torch.randn(5, 8)
    x_jax = torchleaf.to_jax(x)
    torch_optimizer, optimizer = torch.optim.Adam(model.parameters(), 1e-2), optax.adam(1e-2)
    opt_state = optimizer.init(eqx.filter(jax_model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(jax_model, opt_state):
        loss, grads = eqx.filter_value_and_grad(lambda m: jnp.mean((m(x_jax) - 1) ** 2))(jax_model)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(jax_model, updates), opt_state, loss

    losses = []
    for _ in range(10):
        torch_optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        torch_optimizer.step()
        jax_model, opt_state, expected = step(jax_model, opt_state)
        losses.append((loss.item(), float(expected)))
    assert losses[-1][0] < losses[0][0]
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.long
@each_model
def test_training_with_torchs_tools(name):
    model, x = made(name)
    jax_before = jax.tree.leaves(torchleaf.to_jax_model(model))
    decayed = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 1e-3}, {"params": biases, "lr": 0.02}], lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss = (model(x) - 0.3).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for before, now in zip(jax_before, jax.tree.leaves(torchleaf.to_jax_model(model)), strict=True):
        if isinstance(before, jax.Array) and jnp.issubdtype(before.dtype, jnp.inexact):
            assert not jnp.array_equal(before, now)  # nor did torch write into what JAX was given


def test_the_model_that_is_given_never_changes():
    jax_model = eqx.nn.Linear(3, 2, key=KEY)
    before = jnp.array(jax_model.weight)
    model = torchleaf.JaxModule(jax_model)
    with torch.no_grad():
        model.weight.zero_()
    assert jnp.array_equal(jax_model.weight, before)
    taken = torchleaf.to_jax_model(model)
    with torch.no_grad():
        model.weight.fill_(1)
    assert not jnp.any(taken.weight)


@pytest.mark.long
@each_model
def test_state_dicts(name):
    model, x = made(name)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    model.eval(), other.eval()
    assert not torch.equal(model(x), other(x))
    assert str(other.load_state_dict(model.state_dict(), strict=True)) == "<All keys matched successfully>"
    assert torch.equal(model(x), other(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


@pytest.mark.long
@each_model
def test_copies_pickles_and_files(name):
    model, x = made(name)
    model.eval()
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), expected)
        with torch.no_grad():
            next(again.parameters()).add_(1)
    assert torch.equal(model(x), expected)


def test_pickles_of_layers_with_lambdas_and_state():
    mlp = torchleaf.JaxModule(eqx.nn.MLP(2, 2, 4, 1, key=KEY))
    x = torch.randn(2)
    assert torch.equal(pickle.loads(pickle.dumps(mlp))(x), mlp(x))
    norm = batch_norm()
    again = pickle.loads(pickle.dumps(norm))
    x = torch.randn(4, 3)
    assert torch.equal(again(x), norm(x))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@each_model
def test_dtypes(name, dtype, request):
    if dtype == torch.float64:
        request.getfixturevalue("x64")
    model, x = made(name)
    model = model.to(dtype).eval()
    assert all(p.dtype == dtype for p in model.parameters())
    out = model(x.to(dtype))
    out.float().sum().backward()
    assert all(p.grad.dtype == dtype for p in model.parameters())
    if name != "function":
        assert out.dtype == dtype


@pytest.mark.long
def test_devices():
    model, x = made("equinox")
    before = model(x)
    assert model.to("cpu").cpu() is model
    torch.testing.assert_close(model(x), before)
    with pytest.raises(TypeError, match=r"key_proj.weight'\] is a meta tensor.*to_empty\(device='cpu'\)"):
        model.to("meta")(x)
    model = model.to_empty(device="cpu")
    model.load_state_dict(made("equinox")[0].state_dict())
    torch.testing.assert_close(model(x), before)


def test_double_without_x64_says_which_weight():
    model = torchleaf.JaxModule(eqx.nn.MLP(2, 2, 4, 1, key=KEY)).double()
    with pytest.raises(TypeError, match=r"MLP: weights\['layers.0.(weight|bias)'\] is torch.float64.*jax_enable_x64"):
        model(torch.ones(2))


@pytest.mark.long
@each_model
def test_gradients_by_finite_differences(name, x64):
    model, x = made(name)
    model = model.double().eval()
    names = [n for n, p in model.named_parameters() if p.numel() < 100][:3]
    weights = [dict(model.named_parameters())[n].detach().requires_grad_() for n in names]

    def f(x, *weights):
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,)).sum(0)

    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(f, (x, *weights))
    if name in ("function", "equinox"):
        assert torch.autograd.gradgradcheck(f, (x, *weights), atol=1e-4)


class Tied(eqx.Module):
    first: jax.Array
    second: jax.Array

    def __call__(self, x):
        return self.second.T @ jnp.tanh(self.first @ x)


def test_shared_arrays_are_one_parameter():
    weight = jax.random.normal(KEY, (4, 3))
    model = torchleaf.JaxModule(Tied(weight, weight))
    assert [n for n, _ in model.named_parameters()] == ["first"]
    assert model.first is model.second
    assert model.state_dict().keys() == {"first", "second"}
    x = torch.randn(3)
    model(x).sum().backward()
    w = torchleaf.to_torch(weight, copy=True).requires_grad_()
    (w.T @ torch.tanh(w @ x)).sum().backward()
    torch.testing.assert_close(model.first.grad, w.grad)
    again = copy.deepcopy(model)
    assert again.first is again.second is not model.first
    taken = torchleaf.to_jax_model(model)
    assert taken.first is taken.second


def batch_norm():
    norm, state = eqx.nn.make_with_state(lambda: eqx.nn.BatchNorm(3, "batch", momentum=0.9, mode="batch"))()
    return torchleaf.JaxModule(norm, state, axis_name="batch")


def flax_batch_norm(framework):
    if framework == "linen":

        class Norm(linen.Module):
            @linen.compact
            def __call__(self, x, train):
                return linen.BatchNorm(momentum=0.9)(x, use_running_average=not train)

        return torchleaf.JaxModule(Norm(), Norm().init(KEY, jnp.ones((2, 3)), False))
    return torchleaf.JaxModule(nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("framework", ["equinox", "linen", "nnx"])
def test_batch_norm_is_torchs(framework):
    model = batch_norm() if framework == "equinox" else flax_batch_norm(framework)
    reference = nn.BatchNorm1d(3, momentum=0.1)
    mean = next(b for n, b in model.named_buffers() if n.endswith(("mean", "state.1.0")))
    for mode in (True, True, False):
        model.train(mode), reference.train(mode)
        before = mean.clone()
        x = torch.randn(16, 3, requires_grad=True)
        z = x.detach().clone().requires_grad_()
        out, expected = model(x), reference(z)
        if mode:
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
            out.pow(3).sum().backward()
            expected.pow(3).sum().backward()
            torch.testing.assert_close(x.grad, z.grad, rtol=1e-3, atol=1e-3)
        assert torch.equal(mean, before) is not mode  # in place, as BatchNorm's are


def test_double_backward_and_state():
    """The state that a call changes in place is not what its backward pass reads."""
    model = batch_norm()
    x = torch.randn(8, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
    model(x)
    grad.square().sum().backward()
    y = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.BatchNorm1d(3)(y).pow(3).sum(), y, create_graph=True)
    grad.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.long
@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_modes_and_dropout(name):
    model, x = made(name)
    torch.manual_seed(1)
    first, second = model(x), model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x, key=torch.Generator().manual_seed(1)), model(x, key=torch.Generator().manual_seed(1)))
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x), model(x))
    before = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn where nothing is random


def test_equinox_dropout_and_modes():
    model = torchleaf.JaxModule(eqx.nn.Dropout(0.5))
    x = torch.ones(64, requires_grad=True)
    torch.manual_seed(0)
    y = model(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), y)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(model.eval()(x), x)
    per_example = torch.func.vmap(model.train(), randomness="different")(torch.ones(4, 64))
    assert len({tuple(row) for row in per_example.tolist()}) == 4


def test_a_batch_of_examples_with_keys_of_their_own():
    model = torchleaf.JaxModule(eqx.nn.Dropout(0.5), axis_name="batch")
    assert len({tuple(row) for row in model(torch.ones(4, 64)).tolist()}) == 4


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torch_func():
    model = torchleaf.JaxModule(eqx.nn.MLP(3, 1, 8, 2, key=KEY))
    x = torch.randn(5, 3)
    jax_model = torchleaf.to_jax_model(model)
    hessians = torch.func.vmap(torch.func.hessian(lambda x: model(x)[0]))(x)
    expected = jax.vmap(jax.hessian(lambda x: jax_model(x)[0]))(torchleaf.to_jax(x))
    torch.testing.assert_close(hessians.detach(), torchleaf.to_torch(expected), rtol=1e-3, atol=1e-4)
    ensemble = [torchleaf.JaxModule(eqx.nn.Linear(3, 2, key=jax.random.key(i))) for i in range(3)]
    params, buffers = torch.func.stack_module_state(ensemble)
    call = lambda p, b: torch.func.functional_call(ensemble[0], (p, b), (x[0],))  # noqa: E731
    out = torch.func.vmap(call)(params, buffers)
    torch.testing.assert_close(out, torch.stack([m(x[0]) for m in ensemble]))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@each_model
def test_torch_compile(name):
    torch._dynamo.reset()
    model, x = made(name)
    model.eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out, expected = compiled(x), model(x)
    torch.testing.assert_close(out, expected)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(y.square().sum(), parameters, retain_graph=True) for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_frozen_and_parametrized_weights():
    model = torchleaf.JaxModule(eqx.nn.Linear(3, 2, key=KEY))
    model.bias.requires_grad_(False)
    expected = model(torch.ones(3)).detach()
    nn.utils.parametrizations.weight_norm(model, "weight")
    y = model(torch.ones(3))
    torch.testing.assert_close(y.detach(), expected)
    y.sum().backward()
    assert model.bias.grad is None
    assert model.parametrizations.weight.original0.grad.any()


def test_integers_keys_and_statics_in_a_model():
    params = {
        "w": jnp.ones(3),
        "n": jnp.arange(3),
        "key": jax.random.key(1),
        "name": "static",
        "inner": {"a.b": jnp.ones(2)},
    }

    def fn(params, x):
        assert params["name"] == "static"
        noise = jax.random.normal(params["key"], (3,))
        return params["w"][params["n"]] * x + noise, params["inner"]["a.b"]

    model = torchleaf.JaxModule(fn, params)
    assert {n for n, _ in model.named_parameters()} == {"w", "inner.a.b"}
    assert {n for n, _ in model.named_buffers()} == {"n", "key"}
    out, _ = model(torch.ones(3))
    torch.testing.assert_close(out.detach(), torchleaf.to_torch(fn(params, jnp.ones(3))[0]))
    assert jax.random.key_data(torchleaf.to_jax_model(model)[1]["key"]).tolist() == [0, 1]


ERRORS = {
    "number": (lambda: torchleaf.JaxModule(3), "model is a int without parameters"),
    "function alone": (lambda: torchleaf.JaxModule(jnp.sin), "or a function together with the pytree"),
    "linen alone": (
        lambda: torchleaf.JaxModule(LinenCNN()),
        "the Linen module LinenCNN, which has no weights",
    ),
    "axis_name": (lambda: torchleaf.JaxModule(rnn, rnn_params(), axis_name="i"), "axis_name is for Equinox"),
    "to_jax_model": (
        lambda: torchleaf.to_jax_model(nn.Linear(2, 2)),
        "module is a Linear; give a",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refused(name):
    call, message = ERRORS[name]
    with pytest.raises(TypeError, match=message):
        call()
