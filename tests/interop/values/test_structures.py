"""Structured arguments and outputs of torch functions: values, gradients and types as in torch, inputs untouched."""

import collections
import dataclasses
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close, eager_and_jit, from_torch, torch_gradients
from module_reference import torch_weighted_sum, weighted_sum
from samples import as_torch, raw_bytes
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torchleaf import TorchCallError, TorchModule, to_jax, to_torch, torch_function
from transformers.modeling_outputs import BaseModelOutput

pytestmark = pytest.mark.both_engines(every=4)
X = jnp.arange(6.0).reshape(2, 3) / 3 - 0.5
Y = jnp.linspace(1, 2, 6).reshape(2, 3)


class Pair(NamedTuple):
    left: Any
    right: Any


class Module(eqx.Module):
    weight: Any
    bias: Any


@dataclasses.dataclass
class Plain:
    x: Any
    y: Any
    name: str = "plain"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    rest: Any = None
    count: int = 3


@dataclasses.dataclass(slots=True)
class Slots:
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived(Frozen):
    """Fields that the constructor computes, one of them undeclared."""

    y: Any
    total: Any = dataclasses.field(init=False)

    def __post_init__(self):
        if isinstance(self.x, Derived):
            raise TypeError("constructed from its own kind")
        object.__setattr__(self, "total", self.x + self.y)
        object.__setattr__(self, "label", f"{self.count} of them")


class Kind(NamedTuple):
    make: Callable[[Any, Any], Any]
    pick: Callable[[Any], tuple[Any, Any]]


KINDS = {
    "dict": Kind(lambda x, y: {"b": x, "a": y}, lambda c: (c["b"], c["a"])),
    "list": Kind(lambda x, y: [x, y], tuple),
    "namedtuple": Kind(lambda x, y: Pair(x, Pair(None, y)), lambda c: (c.left, c.right.right)),
    "OrderedDict": Kind(lambda x, y: collections.OrderedDict(b=x, a=y), lambda c: tuple(c.values())),
    "defaultdict": Kind(lambda x, y: collections.defaultdict(list, {"a": [x, y]}), lambda c: tuple(c["a"])),
    "nested": Kind(lambda x, y: {"a": [x, (None, {"c": y})], "b": ()}, lambda c: (c["a"][0], c["a"][1][1]["c"])),
    "ModelOutput": Kind(
        lambda x, y: BaseModelOutput(last_hidden_state=x, hidden_states=(y,)),
        lambda c: (c.last_hidden_state, c["hidden_states"][0]),
    ),
    "equinox module": Kind(Module, lambda c: (c.weight, c.bias)),
    "dataclass": Kind(Plain, lambda c: (c.x, c.y)),
    "frozen dataclass": Kind(lambda x, y: Frozen(x, {"y": [y]}), lambda c: (c.x, c.rest["y"][0])),
    "dataclass with slots": Kind(Slots, lambda c: (c.x, c.y)),
    "dataclass with computed fields": Kind(lambda x, y: Derived(x=x, y=y), lambda c: (c.x, c.total - c.x)),
    "dataclasses in containers": Kind(lambda x, y: [Frozen(Slots(x, (Plain(y, None),)))], lambda c: _innermost(c[0].x)),
}


def _innermost(slots: Any) -> tuple[Any, Any]:
    return slots.x, slots.y[0].x


each_kind = pytest.mark.parametrize("kind", KINDS)


@eager_and_jit
@each_kind
def test_container_in_and_out(kind, jit):
    make, pick = KINDS[kind]

    def compute(container):
        x, y = pick(container)
        return make(x.sin() * 2, x * y)

    given, function = make(X, Y), torch_function(compute)
    got = jit(lambda x, y: function(make(x, y)))(X, Y)
    expected = compute(make(as_torch(X), as_torch(Y)))
    assert type(got) is type(expected)
    assert_trees_close(got, from_torch(expected))
    got = function(given)
    assert_trees_close(jit(function)(got), function(got))  # what comes out goes in again
    grads = jit(jax.grad(lambda *xy: weighted_sum(function(make(*xy))), (0, 1)))(X, Y)
    assert_trees_close(grads, torch_gradients(lambda *xy: torch_weighted_sum(compute(make(*xy))), X, Y))


@each_kind
def test_container_under_vmap(kind):
    make, pick = KINDS[kind]

    def compute(container):
        x, y = pick(container)
        return make(x.cumsum(-1), x @ y)

    got = jax.vmap(torch_function(compute))(to_jax(make(X, Y)))
    rows = [compute(make(as_torch(x), as_torch(y))) for x, y in zip(X, Y, strict=True)]
    leaves = [jax.tree.leaves(from_torch(row)) for row in rows]
    assert_trees_close(jax.tree.leaves(got), [jnp.stack(column) for column in zip(*leaves, strict=True)])
    assert type(got) is type(rows[0])


# --- dataclasses ---------------------------------------------------------------------------------


@eager_and_jit
def test_fields_without_arrays_are_static(jit):
    seen = []

    @torch_function
    def look(given):
        seen.append((given.name, given.y))
        return Plain(given.x * 2, given.y, given.name + "!")

    got = jit(lambda x: look(Plain(x, ("static", 2, torch.float64), "first")))(X)
    assert (got.name, got.y) == ("first!", ("static", 2, torch.float64))
    assert_trees_close(got.x, 2 * X)
    assert set(seen) == {("first", ("static", 2, torch.float64))}
    assert len(jax.tree.leaves(got)) == 1


def test_static_fields_choose_code_and_are_told_apart():
    describe = torch_function(lambda given: (given.x + 1, f"{given.y!r} {given.name}"))
    for _ in range(2):
        for value in (1, 1.0, True, 0.0, -0.0, "1", None, [1], (1,), {"a": 1}, torch.float32):
            assert describe(Plain(X, value))[1] == f"{value!r} plain"


def test_equal_static_fields_share_a_trace():
    traced = []

    @jax.jit
    def compiled(given):
        traced.append(given.name)
        return torch_function(torch.sin)(given.x)

    for name in ("a", "a", "b", "".join(["a"])):
        compiled(to_jax(Plain(X, float("nan"), name)))
    assert traced == ["a", "b"]


def test_constructors_do_not_run_again():
    built = []

    @dataclasses.dataclass
    class Counted:
        x: Any

        def __post_init__(self):
            built.append(type(self.x))

    given = Counted(X)
    function = torch_function(lambda given: given.x * 2)
    assert_trees_close(function(given), 2 * X)  # from here on JAX knows the class
    assert_trees_close(jax.jit(function)(given), 2 * X)
    assert len(built) == 1


def test_attributes_that_are_no_fields_are_kept():
    got = torch_function(lambda given: given)(Derived(x=X, y=Y, count=2))
    assert (got.label, got.count) == ("2 of them", 2)
    assert_trees_close(got.total, X + Y)


def test_methods_and_equality_of_rebuilt_instances():
    got = torch_function(lambda given: given)(Frozen(X, count=5))
    assert dataclasses.replace(got, x=None) == Frozen(None, count=5)
    assert list(dataclasses.asdict(got)) == ["x", "rest", "count"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.count = 1


def test_gradients_with_respect_to_a_dataclass():
    given = to_jax(Frozen(X, {"y": [Y]}))
    grads = jax.grad(torch_function(lambda g: (g.x * g.rest["y"][0] ** g.count).sum()))(given)
    assert_trees_close(grads, Frozen(Y**3, {"y": [3 * X * Y**2]}))


def test_filtered_transformations_take_dataclasses():
    """Equinox puts None, booleans and functions in the place of arrays and puts the instances together again."""
    given = to_jax(Frozen(X, [jnp.arange(2), "name"]))  # from here on JAX knows the class
    loss = torch_function(lambda g: (g.x**2).sum() * g.rest[0].sum())
    grads = eqx.filter_jit(eqx.filter_grad(loss))(given)
    assert_trees_close([grads.x, grads.rest, grads.count], [2 * X, [None, None], 3])
    dynamic, static = eqx.partition(given, jax.tree.map(eqx.is_inexact_array, given))
    assert_trees_close(eqx.combine(dynamic, static), given)
    axes = jax.tree.map(lambda leaf: 0 if eqx.is_inexact_array(leaf) else None, given)
    rows = eqx.filter_vmap(torch_function(lambda g: g.x.cumsum(-1)), in_axes=(axes,))(given)
    assert_trees_close(rows, jnp.cumsum(X, -1))


def test_transformations_of_jax_take_dataclasses():
    step = torch_function(lambda g: Plain(g.x * g.y, g.y))
    given = to_jax(Plain(X, Y))
    carried, _ = jax.lax.scan(lambda g, _: (step(g), None), given, length=3)
    assert_trees_close(carried, Plain(X * Y**3, Y), rtol=1e-4)
    chosen = jax.lax.cond(X.sum() > 0, step, lambda g: g, given)
    assert_trees_close(chosen, Plain(X * Y, Y))
    assert_trees_close(jax.eval_shape(step, given), jax.eval_shape(lambda g: g, given))
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("rows")
    sharded = jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=rows)
    assert_trees_close(sharded(given), Plain(X * Y, Y))


@pytest.mark.torch_engine  # values are read
def test_declared_output():
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    function = torch_function(lambda x: Frozen(x * x.sum().item()), out_shape=Frozen(shape))
    assert_trees_close(jax.jit(function)(X), Frozen(X * X.sum()))


@dataclasses.dataclass(frozen=True)
class Options:
    power: int = 2
    names: tuple[str, ...] = ("a",)


@dataclasses.dataclass
class Settings:
    power: int = 2
    names: list[str] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize("cls", [Options, Settings])
def test_dataclass_without_arrays_is_static(cls):
    power = torch_function(lambda x, options: (x**options.power, len(options.names)))
    for exponent in (2, 3, 2):
        got = jax.jit(lambda x, exponent=exponent: power(x, cls(power=exponent))[0])(X)
        assert_trees_close(got, X**exponent)
        assert power(X, cls(exponent, type(cls().names)("ab")))[1] == 2


def test_hashable_dataclass_without_arrays_arrives_as_it_is():
    @dataclasses.dataclass(eq=False)
    class Node:
        """A tree whose nodes know their parents."""

        parent: Any
        children: list[Any] = dataclasses.field(default_factory=list)

    root, seen = Node(None), []
    root.children.append(Node(root))
    torch_function(lambda x, node: seen.append(node) or x)(X, root)
    assert all(node is root for node in seen)


@eager_and_jit
@pytest.mark.parametrize("cls", [Frozen, Plain])
def test_optional_fields(cls, jit):
    """The structure depends on a flag, and is an instance of the class also where nothing is in it."""
    fresh = dataclasses.make_dataclass(cls.__name__, ["x", "y"], frozen=cls is Frozen)

    @torch_function
    def optional(x, *, first, second):
        return x + 1, fresh(x * 2 if first else None, [x * 3] if second else None)

    for first, second in ((False, False), (True, False), (True, True), (False, True)):
        got = jit(lambda x, a=first, b=second: optional(x, first=a, second=b))(X)
        assert_trees_close(got, (X + 1, fresh(2 * X if first else None, [3 * X] if second else None)))
        assert type(got[1]) is fresh


# --- packed sequences ----------------------------------------------------------------------------

LENGTHS = (2, 4, 3)


def _packed(*, is_sorted: bool) -> PackedSequence:
    sequences = [torch.randn(n, 3) for n in (sorted(LENGTHS, reverse=True) if is_sorted else LENGTHS)]
    return pack_sequence(sequences, enforce_sorted=is_sorted)


def _assert_packed_close(actual: Any, expected: PackedSequence) -> None:
    assert type(actual) is PackedSequence
    assert torch.equal(actual.batch_sizes, expected.batch_sizes)
    assert_trees_close(actual, from_torch(expected))


@pytest.mark.parametrize("is_sorted", [False, True], ids=["unsorted", "sorted"])
def test_packed_sequence_converts(is_sorted):
    packed = _packed(is_sorted=is_sorted)
    there = to_jax(packed)
    _assert_packed_close(there, packed)
    assert jax.tree.leaves(there)[0] is there.data
    back = to_torch(there)
    assert torch.equal(back.data, packed.data)
    padded, lengths = pad_packed_sequence(back)
    expected, expected_lengths = pad_packed_sequence(packed)
    assert torch.equal(padded, expected)
    assert torch.equal(lengths, expected_lengths)


RECURRENT = {
    "LSTM": lambda: torch.nn.LSTM(3, 4, 2, bidirectional=True),
    "GRU": lambda: torch.nn.GRU(3, 4),
    "RNN": lambda: torch.nn.RNN(3, 4, batch_first=True),
}


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("is_sorted", [False, True], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("layer", RECURRENT)
def test_recurrent_layer_on_packed_sequence(layer, is_sorted, jit):
    module, packed = RECURRENT[layer](), _packed(is_sorted=is_sorted)
    model, given = TorchModule(module), to_jax(packed)
    static = eqx.filter(model, eqx.is_array, inverse=True)
    run = jit(lambda arrays, data: eqx.combine(arrays, static)(eqx.tree_at(lambda p: p.data, given, data)))
    arrays = eqx.filter(model, eqx.is_array)
    (got, state), (expected, expected_state) = run(arrays, given.data), module(packed)
    _assert_packed_close(got, expected)
    assert_trees_close(state, from_torch(expected_state))

    data_grad = jit(jax.grad(lambda data: weighted_sum(run(arrays, data)[0].data)))(given.data)
    grads = jit(jax.grad(lambda arrays: weighted_sum(run(arrays, given.data)[0].data)))(arrays)
    leaf = packed.data.clone().requires_grad_()
    output = module(PackedSequence(leaf, *packed[1:]))[0].data
    names = [name for name, _ in module.named_parameters()]
    wanted = torch.autograd.grad(torch_weighted_sum(output), [leaf, *module.parameters()])
    assert_trees_close(data_grad, from_torch(wanted[0]), 1e-4)
    assert_trees_close(grads.params, from_torch(dict(zip(names, wanted[1:], strict=True))), 1e-4)


class Tagger(torch.nn.Module):
    """Packs, runs a recurrent layer, pads: how most models use packed sequences."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = torch.nn.LSTM(3, 4, batch_first=True), torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        padded, lengths = pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(padded), lengths


@pytest.mark.torch_engine  # lengths are read
@eager_and_jit
def test_packing_inside_a_module(jit):
    module, x = Tagger(), torch.randn(3, 4, 3)
    model = TorchModule(module)
    assert_trees_close(jit(lambda x: model(x, LENGTHS))(from_torch(x)), from_torch(module(x, LENGTHS)))
    got = jit(jax.grad(lambda x: weighted_sum(model(x, LENGTHS)[0])))(from_torch(x))
    assert_trees_close(
        got, torch_gradients(lambda x: torch_weighted_sum(module(x, LENGTHS)[0]), from_torch(x))[0], 1e-4
    )


def test_packed_sequences_of_other_lengths_are_other_signatures():
    total = torch_function(lambda packed: (packed.data.sum(), int(packed.batch_sizes[0])))
    for lengths in ((2, 1), (1, 1, 1), (2, 1)):
        packed = pack_sequence([torch.ones(n, 2) for n in lengths])
        got = total(to_jax(packed))
        assert_trees_close(got, (jnp.float32(6.0), len(lengths)))


# --- signatures ----------------------------------------------------------------------------------


def _with_default(x, scale=torch.ones(3) * 2, *, shift=torch.arange(3.0)):  # noqa: B008
    return x * scale + shift


@eager_and_jit
@pytest.mark.parametrize("given", [{}, {"scale": Y}, {"shift": Y}, {"scale": Y, "shift": X}], ids=str)
def test_default_tensors_and_keyword_only_tensors(given, jit):
    function = torch_function(_with_default)
    tensors = {name: as_torch(value) for name, value in given.items()}
    assert_trees_close(jit(function)(X, **given), from_torch(_with_default(as_torch(X), **tensors)))
    grads = jit(jax.grad(lambda x, kw: weighted_sum(function(x, **kw)), (0, 1)))(X, given)
    assert_trees_close(grads, torch_gradients(lambda x, kw: torch_weighted_sum(_with_default(x, **kw)), X, given))


class Flexible(torch.nn.Module):
    """Arguments and keywords of any number, passed on from one module to the next."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Bilinear(3, 3, 2)

    def forward(self, x: torch.Tensor, *more: Any, mask: Any = None, return_all: bool = False, **named: Any) -> Any:
        for other in [*more, *named.values()]:
            x = x + (other["x"] if isinstance(other, dict) else other)
        y = self.inner(x, x)
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        return (y, {"x": x, "named": len(named) * x}) if return_all else y


@eager_and_jit
@pytest.mark.parametrize(
    ("args", "kwargs", "flags"),
    [
        ((X,), {}, {}),
        ((X, Y, {"x": X}), {}, {"return_all": True}),
        ((X,), {"mask": jnp.array([[True, False], [False, False]])}, {}),
        ((X, Y), {"third": Y, "fourth": {"x": X}}, {"return_all": True}),
    ],
    ids=["one", "positional", "mask", "named"],
)
def test_modules_with_any_signature(args, kwargs, flags, jit):
    module = Flexible()
    model = TorchModule(module)
    got = jit(lambda a, k: model(*a, **k, **flags))(args, kwargs)
    as_tensors = jax.tree.map(as_torch, (args, kwargs))
    assert_trees_close(got, from_torch(module(*as_tensors[0], **as_tensors[1], **flags)))


# --- aliases -------------------------------------------------------------------------------------


def _twice(x, y):
    z = x * y
    return z, {"again": z, "more": [z]}


ALIASES = {
    "input as it is": lambda x, y: x,
    "input and more": lambda x, y: (x, x * y, x),
    "inputs in a container": lambda x, y: {"x": x, "xy": (x, y)},
    "same tensor twice": _twice,
    "transpose": lambda x, y: (x.T, x.mT.mT, x),
    "expand": lambda x, y: x[:, :1].expand(2, 5),
    "slices": lambda x, y: (x[:, 1:], x[::2], x[0, 0], x[:0]),
    "as_strided": lambda x, y: torch.as_strided(x, (2, 2), (1, 2), 1),
    "overlapping windows": lambda x, y: x.reshape(-1).unfold(0, 3, 1),
    "view and base": lambda x, y: ((z := x * y), z.view(3, 2), z[0], z.diagonal()),
    "chunks": lambda x, y: (x * 2).split(1, dim=1),
    "unbind": lambda x, y: x.unbind(),
    "detached": lambda x, y: (x.detach(), y * x.detach()),
    "written through a view": lambda x, y: ((z := x * 1), z[0].mul_(3), z),
    "input written and returned": lambda x, y: (x.mul_(2), x, y),
    "input returned before and after a write": lambda x, y: (x.clone(), x.add_(y), x[0]),
}


@eager_and_jit
@pytest.mark.parametrize("kind", ALIASES)
def test_outputs_that_alias(kind, jit):
    function = torch_function(ALIASES[kind])
    x, y = X + 0, Y + 0
    before = raw_bytes(x), raw_bytes(y)
    got = jit(function)(x, y)
    assert_trees_close(got, from_torch(ALIASES[kind](as_torch(X), as_torch(Y))))
    grads = jit(jax.grad(lambda x, y: weighted_sum(function(x, y)), (0, 1)))(x, y)

    def loss(x, y):  # a write into a leaf that needs its gradient is an error in torch
        return torch_weighted_sum(ALIASES[kind](x * 1, y * 1))

    assert_trees_close(grads, torch_gradients(loss, x, y))
    assert (raw_bytes(x), raw_bytes(y)) == before
    kept = jax.tree.map(np.array, got)
    x.delete()
    y.delete()
    jax.block_until_ready([jnp.full((2, 3), 7.0) for _ in range(20)])  # in memory that has become free
    assert_trees_close(jax.tree.leaves(got), jax.tree.leaves(kept))


@pytest.mark.parametrize("kind", ALIASES)
def test_outputs_that_alias_under_vmap(kind):
    function, batch = torch_function(ALIASES[kind]), (jnp.stack([X, 2 * X, -X]), jnp.stack([Y, Y + 1, Y / 2]))
    got = jax.tree.leaves(jax.vmap(function)(*batch))
    examples = [jax.tree.leaves(function(x, y)) for x, y in zip(*batch, strict=True)]
    assert_trees_close(got, [jnp.stack(column) for column in zip(*examples, strict=True)])


# --- what is no structure ------------------------------------------------------------------------

OPAQUE = {
    "module": torch.nn.Linear(2, 2),
    "generator": torch.Generator(),
    "distribution": torch.distributions.Normal(torch.zeros(2), torch.ones(2)),
    "namespace": types.SimpleNamespace(x=torch.ones(2)),
    "set": {1, 2},
}


@pytest.mark.parametrize("kind", OPAQUE)
@pytest.mark.parametrize(
    ("wrap", "path"),
    [(lambda x, o: o, ""), (lambda x, o: {"k": [o]}, r"\['k'\]\[0\]"), (lambda x, o: Plain(x, o), r"\.y")],
    ids=["bare", "nested", "in a dataclass"],
)
def test_other_objects_are_refused(kind, wrap, path):
    """What their attributes mean, and whether they may be copied, only they know."""
    name = type(OPAQUE[kind]).__name__
    with pytest.raises(TorchCallError, match=rf"returns a .*{name} at output{path}:"):
        torch_function(lambda x: wrap(x, OPAQUE[kind]))(X)


def test_module_that_is_a_dataclass_is_no_structure():
    @dataclasses.dataclass(eq=False)
    class Layer(torch.nn.Module):
        scale: Any

        def __post_init__(self):
            super().__init__()

    layer = Layer(torch.ones(2))
    assert to_jax([layer])[0] is layer
    with pytest.raises(TorchCallError, match=r"returns a .*Layer at output"):
        torch_function(lambda x: layer)(X)
