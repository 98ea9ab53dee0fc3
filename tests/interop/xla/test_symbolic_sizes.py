"""Programs for all sizes: exported once, and called with several, against torch."""

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.all_cases
XLA = {"engine": "xla", "strict": True}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _specs(*shapes, dtype=jnp.float32, constraints=()):
    scope = jax.export.SymbolicScope(constraints)
    return [jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), dtype) for shape in shapes]


def _draw(shape, sizes, dtype=jnp.float32):
    shape = eval(f"({shape},)", {}, sizes)
    return torch.randn(shape) if dtype == jnp.float32 else torch.randint(0, 8, shape, dtype=torch.int32)


def _ours(fn):
    return torchleaf.TorchModule(fn, **XLA) if isinstance(fn, nn.Module) else torchleaf.torch_function(fn, **XLA)


def _exported(fn, *specs):
    return jax.export.export(jax.jit(lambda *args: fn(*args)))(*specs)


def _written(x):
    y = x.clone()
    y[:, 0] = 1
    y.t()[1].mul_(2)
    return y * x.shape[0]


def _causal(x):
    ahead = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
    return (x @ x.transpose(1, 2)).masked_fill(ahead, -1e9).softmax(-1) @ x


def _positions(x):
    places = torch.arange(x.shape[1], dtype=torch.float32)[:, None]
    return x + torch.sin(places / torch.arange(1, 9.0))


B = [{"b": 1}, {"b": 2}, {"b": 7}]
LARGER = [{"b": 3}, {"b": 6}]
BT = [{"b": 1, "t": 3}, {"b": 4, "t": 1}, {"b": 3, "t": 5}]
CONV = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 2))
CASES = {
    "linear": (nn.Linear(3, 4), "b, 3", B),
    "mlp": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "b, t, 3", BT),
    "convolutions": (CONV.eval(), "b, 1, 8, 8", B),
    "batch norm": (nn.BatchNorm1d(8).eval(), "b, 8", B),
    "layer norm": (nn.LayerNorm(8), "b, t, 8", BT),
    "group norm": (nn.GroupNorm(2, 4), "b, 4, 3", B),
    "recurrent": (nn.GRU(8, 4, batch_first=True), "b, 6, 8", B),
    "two layers of LSTM": (nn.LSTM(8, 4, 2), "6, b, 8", B),
    "a line": (nn.Conv1d(3, 4, 3, stride=2, padding=1), "b, 3, t", BT),
    "a transposed line": (nn.ConvTranspose1d(3, 2, 3, 2), "b, 3, t", BT),
    "pools": (nn.Sequential(nn.MaxPool1d(2), nn.AvgPool1d(3, 1, 1), nn.AdaptiveAvgPool1d(2)), "b, 3, 2*t", BT),
    "resized": (nn.Upsample(scale_factor=2, mode="bilinear"), "b, 1, t, t", BT),
    "bilinear": (nn.Bilinear(3, 3, 2), ("b, 3", "b, 3"), B),
    "a loss": (nn.CrossEntropyLoss(), ("b, 3", "b, 3"), B),
    "a mean": (lambda x: (x - x.mean()) / x.shape[0] + x.shape[0] ** 0.5, "b, 3", B),
    "deviations": (lambda x: x.var(0) + x.std(), "b, 3", LARGER),
    "a view": (lambda x: x.view(x.shape[0] * 3) + torch.arange(x.shape[0] * 3), "b, 3", B),
    "a view of an expression": (lambda x: x.view(-1, 2, 3).sum(1), "2*b, 3", B),
    "another order": (lambda x, y: (x.transpose(0, 1) * y).reshape(-1), ("b, t, 3", "t, b, 3"), BT),
    "new tensors": (lambda x: x[:1].expand(x.shape[0], 3) + torch.full((x.shape[0], 1), 3.0), "b, 3", B),
    "joined": (lambda x: torch.cat([x, torch.stack([x, 2 * x], 1).flatten(0, 1)]).repeat(2, 1), "b, 3", B),
    "parts": (lambda x: torch.cat([*x.split(1, 1), x.chunk(2, -1)[0]], 1).flip(0).roll(1, 0), "b, 4", B),
    "slices": (lambda x: (x[:5].sum(), x[:, -1], x[: x.shape[0] // 2], x[1:]), "b, t", BT[1:]),
    "taken": (lambda x: x[torch.arange(x.shape[0]), 0], "b, 3", B),
    "scattered": (
        lambda x: torch.zeros(x.shape[0], 5).scatter_add(1, torch.arange(3).expand(x.shape[0], 3), x),
        "b, 3",
        B,
    ),
    "written through views": (_written, "b, 3", B),
    "a causal mask": (_causal, "b, t, 3", BT),
    "fused attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "b, 2, t, 8", BT),
    "positions": (_positions, "b, t, 8", BT),
    "sorted": (lambda x: (x.sort(0)[0], x.topk(2, 1)[0], x.cumsum(0)), "b, 3", B),
    "einsum": (lambda x, y: torch.einsum("bij,bjk->bik", x, y), ("b, t, 3", "b, 3, 4"), BT),
    "similarities": (lambda x: F.cosine_similarity(x[:, None], x[None], dim=-1), "b, 3", B),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_one_program_for_all_sizes(name):
    fn, shapes, sizes = CASES[name]
    shapes = (shapes,) if isinstance(shapes, str) else shapes
    exported = _exported(_ours(fn), *_specs(*shapes))
    for some in sizes:
        xs = [_draw(shape, some) for shape in shapes]
        assert_trees_close(exported.call(*from_torch(xs)), from_torch(fn(*xs)), **CLOSE)


def test_an_embedding():
    module = nn.Embedding(8, 4)
    exported = _exported(_ours(module), *_specs("b, t", dtype=jnp.int32))
    for sizes in BT:
        x = _draw("b, t", sizes, jnp.int32)
        assert_trees_close(exported.call(from_torch(x)), from_torch(module(x)))


@pytest.mark.long
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_layer(batch_first):
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first).eval()
    exported = _exported(_ours(module), *_specs("b, t, 8"))
    for sizes in BT:
        x = _draw("b, t, 8", sizes)
        assert_trees_close(exported.call(from_torch(x)), from_torch(module(x)), **CLOSE)


# --- transformations -------------------------------------------------------------------------------------


@pytest.mark.long
def test_gradients_of_programs_for_all_sizes():
    """Exported, and by the derivative that is exported with a program."""
    model = _ours(CONV.eval())
    names = sorted(model.params)

    def loss(*args):
        params = dict(zip(names, args[:-1], strict=True))
        return (eqx.tree_at(lambda m: m.params, model, params)(args[-1]) ** 2).mean()

    given = [model.params[name] for name in names]
    (spec,) = _specs("b, 1, 8, 8")
    gradients = jax.export.export(jax.jit(jax.value_and_grad(loss, range(len(names) + 1))))(*given, spec)
    value = jax.export.export(jax.jit(loss))(*given, spec)
    for size in (1, 3, 6):
        x = torch.randn(size, 1, 8, 8, requires_grad=True)
        result = (CONV(x) ** 2).mean()
        expected = from_torch(torch.autograd.grad(result, [*(CONV.get_parameter(name) for name in names), x]))
        found, slopes = gradients.call(*given, from_torch(x))
        assert_trees_close(found, from_torch(result), **CLOSE)
        assert_trees_close(slopes, expected, **CLOSE)
        assert_trees_close(value.vjp().call(*given, from_torch(x), jnp.ones(())), expected, **CLOSE)


def test_batches_and_derivatives_within():
    module = nn.Linear(3, 4)
    ours = _ours(module)
    (spec,) = _specs("b, t, 3")
    jacobians = _exported(jax.vmap(jax.jacrev(lambda x: ours(x).sum(0))), spec)
    along_another = _exported(jax.vmap(ours, 1, 1), spec)
    for sizes in BT:
        x = _draw("b, t, 3", sizes)
        expected = torch.func.vmap(torch.func.jacrev(lambda x: module(x).sum(0)))(x)
        assert_trees_close(jacobians.call(from_torch(x)), from_torch(expected), **CLOSE)
        assert_trees_close(along_another.call(from_torch(x)), from_torch(module(x)), **CLOSE)


@pytest.mark.long
def test_random_numbers():
    ours = _ours(nn.Dropout())
    (spec,) = _specs("b, 3")
    exported = _exported(lambda x, key: ours(x, key=jax.random.wrap_key_data(key)), spec, jnp.zeros(2, jnp.uint32))
    for size in (1, 4):
        x, key = jnp.ones((size, 3)), jax.random.key(size)
        assert_trees_close(exported.call(x, jax.random.key_data(key)), ours(x, key=key))


def test_state():
    module = nn.BatchNorm1d(3)
    model, state = eqx.nn.make_with_state(torchleaf.TorchModule)(module, **XLA)

    def step(x):
        y, after = model(x, state=state)
        return y, after.get(model.buffer_index)

    exported = _exported(step, *_specs("b, 3", constraints=["b >= 2"]))
    before = {name: x.clone() for name, x in module.named_buffers()}
    for size in (2, 5):
        module.load_state_dict(before, strict=False)
        x = torch.randn(size, 3)
        expected = from_torch((module(x), dict(module.named_buffers())))
        assert_trees_close(exported.call(from_torch(x)), expected, **CLOSE)


def test_shapes_are_told_without_export():
    ours = _ours(CONV)
    (spec,) = _specs("b, 1, 8, 8")
    assert str(jax.eval_shape(lambda x: ours(x), spec).shape) == "(b, 2)"
    assert "i32" in jax.jit(lambda x: ours(x)).trace(spec).lower().as_text()


def test_two_scopes_are_two_signatures():
    ours = _ours(nn.Linear(3, 4))
    for _ in range(2):
        assert _exported(ours, *_specs("b, 3")).call(jnp.ones((5, 3))).shape == (5, 4)
    assert ours(jnp.ones((5, 3))).shape == (5, 4)


# --- what depends on sizes ---------------------------------------------------------------------------------


def test_constraints_settle_questions():
    fn = lambda x: x[:, :4] if x.shape[1] > 3 else x  # noqa: E731
    exported = _exported(_ours(fn), *_specs("b, t", constraints=["t >= 4", "mod(b, 2) == 0"]))
    for shape in [(2, 4), (4, 9)]:
        x = torch.randn(shape)
        assert_trees_close(exported.call(from_torch(x)), from_torch(fn(x)))


def test_a_loop_over_layers_that_asks_for_known_sizes_goes_on():
    def fn(x):
        assert x.shape[-1] == 3
        return x.reshape(-1, 3) if x.ndim > 2 and x.shape[0] >= 1 else x

    assert _exported(_ours(fn), *_specs("b, t, 3")).call(jnp.ones((2, 5, 3))).shape == (10, 3)


REFUSED = {
    "a branch": (lambda x: x if x.shape[0] > 3 else -x, r"decides by b > 3, .*`.*constraints"),
    "an equality": (lambda x: x if x.shape[0] == 3 else -x, r"decides by b == 3, .*test_symbolic_sizes"),
    "a number": (lambda x: x * int(x.shape[0]), r"needs the number b, .*`.*once for each size"),
    "a loop": (lambda x: sum(x[i] for i in range(x.shape[0])), r"needs the number b"),
    "caught": (lambda x: _caught(x), r"decides by b > 3"),
    "a size as a result": (lambda x: (x, x.shape[0]), r"returns a symbolic size.*torch\.tensor"),
    "values": (lambda x: x if x.sum() > 0 else -x, r"reads values.*(?s:.*)tried as b = 5"),
    "an op without a function": (lambda x: torch.linalg.eigvals(x.T @ x), r"linalg_eig.*known"),
}


def _caught(x):
    try:
        return x if x.shape[0] > 3 else -x
    except RuntimeError:
        return x


@pytest.mark.parametrize("name", REFUSED)
def test_code_that_is_for_some_sizes_only_is_refused(name):
    fn, words = REFUSED[name]
    with pytest.raises(torchleaf.TorchCallError, match=words):
        _exported(torchleaf.torch_function(fn, engine="xla"), *_specs("b, 3"))


def test_torchs_modules_are_named_by_their_line():
    module = nn.AvgPool2d(2, ceil_mode=True, padding=1)
    with pytest.raises(torchleaf.TorchCallError, match=r"AvgPool2d decides by .*torch.nn.modules.pooling\.py:\d+"):
        _exported(_ours(module), *_specs("b, 3, t, t"))


def test_an_op_whose_function_needs_a_number_is_named():
    module = nn.AdaptiveMaxPool1d(1)
    with pytest.raises(torchleaf.TorchCallError, match=r"adaptive_max_pool2d.*known"):
        _exported(_ours(module), *_specs("b, 3, t"))


def test_the_other_engine_says_which_one_can():
    model = torchleaf.TorchModule(nn.Linear(3, 4))
    with pytest.raises(torchleaf.TorchCallError, match=r"argument input has the symbolic shape \(b, 3\).*engine='xla'"):
        _exported(model, *_specs("b, 3"))
