"""`to_jax` and `to_torch` over pytrees: every container keeps its type, every other leaf its identity."""

import collections
import concurrent.futures
import enum
import threading
from dataclasses import dataclass, field, make_dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compare import assert_trees_close, eager_and_jit
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import NARROW, raw_bytes, sample
from torchleaf import to_jax, to_torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput


class Pair(NamedTuple):
    left: Any
    right: Any


class Layer(eqx.Module):
    weight: Any
    name: str = eqx.field(static=True)


@dataclass
class Batch:
    images: Any
    labels: Any
    name: str = "train"


@dataclass(frozen=True, slots=True)
class Inner:
    value: Any


class Colour(enum.Enum):
    RED = 1


def _containers(x: Any, y: Any) -> dict[str, Any]:
    """Pytrees that hold two arrays of either framework."""
    return {
        "bare": x,
        "dict": {"b": x, "a": y},
        "nested": {"a": [x, (y, {"c": x})], "b": ()},
        "list": [x, y],
        "tuple": (x, y),
        "namedtuple": Pair(x, Pair(y, None)),
        "OrderedDict": collections.OrderedDict(b=x, a=y),
        "defaultdict": collections.defaultdict(list, {"a": [x, y]}),
        "None": [None, x, None],
        "same leaf twice": (x, x),
        "eqx module": Layer({"w": x, "b": y}, "linear"),
        "eqx in list": [Layer(x, "a"), Layer(None, "b")],
        "jax Partial": jax.tree_util.Partial(max, x, key=y),
        "ModelOutput": BaseModelOutput(last_hidden_state=x, hidden_states=(x, y)),
        "dataclass": Batch(x, [y]),
        "dataclasses in one another": Batch({"a": Inner((x, None))}, Batch(y, None)),
        "ModelOutput in dict": {"out": BaseModelOutput(attentions=(y,)), "x": x},
    }


KINDS = tuple(_containers(0, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_container(kind):
    x, y = torch.arange(6.0).reshape(2, 3), torch.tensor([True, False])
    tensors = _containers(x, y)[kind]
    arrays = _containers(jnp.arange(6.0).reshape(2, 3), jnp.array([True, False]))[kind]
    there = to_jax(tensors)
    assert type(there) is type(arrays)
    assert_trees_close(there, arrays)
    back = to_torch(there)
    assert jax.tree.structure(back) == jax.tree.structure(there)
    assert [raw_bytes(leaf) for leaf in jax.tree.leaves(back)] == [raw_bytes(leaf) for leaf in jax.tree.leaves(arrays)]
    assert all(isinstance(leaf, torch.Tensor) for leaf in jax.tree.leaves(back))


@pytest.mark.parametrize("convert", [to_jax, to_torch], ids=["to_jax", "to_torch"])
def test_other_leaves_stay_the_same_objects(convert):
    leaves = [3, 2.5, True, "name", b"raw", 1j, object(), torch.float32, np.float64(2.0), np.arange(3), Colour.RED, len]
    converted = convert({"leaves": leaves, "none": None})
    assert converted["none"] is None
    assert all(a is b for a, b in zip(converted["leaves"], leaves, strict=True))


def test_each_side_leaves_its_own_arrays_alone():
    tensor, array = torch.ones(2), jnp.ones(2)
    assert to_jax([array])[0] is array
    assert to_torch([tensor])[0] is tensor


def test_the_input_is_not_changed():
    tensors = {"a": [torch.ones(2)]}
    to_jax(tensors)
    assert isinstance(tensors["a"][0], torch.Tensor)


def test_return_types():
    x = torch.tensor([[1.0, 3.0, 2.0], [9.0, 7.0, 8.0]])
    top = to_jax(torch.topk(x, 2))
    assert type(top) is torch.return_types.topk
    np.testing.assert_array_equal(top.values, jax.lax.top_k(jnp.array(x.numpy()), 2)[0])
    np.testing.assert_array_equal(top.indices, jax.lax.top_k(jnp.array(x.numpy()), 2)[1])
    assert torch.equal(to_torch(top).values, torch.topk(x, 2).values)


@dataclass
class ForJax(ModelOutput):
    logits: Any = None
    states: Any = None


@dataclass
class ForTorch(ModelOutput):
    logits: Any = None
    states: Any = None


@pytest.mark.parametrize(
    ("convert", "output", "leaf"),
    [(to_jax, ForJax(logits=torch.ones(2)), jax.Array), (to_torch, ForTorch(logits=jnp.ones(2)), torch.Tensor)],
    ids=["to_jax", "to_torch"],
)
def test_class_that_jax_has_not_met(convert, output, leaf):
    converted = convert([output])[0]
    assert type(converted) is type(output)
    assert isinstance(converted.logits, leaf)
    assert converted.states is None
    assert list(converted.keys()) == ["logits"]


@eager_and_jit
def test_model_output_is_a_pytree_of_jax(jit):
    output = to_jax(BaseModelOutput(last_hidden_state=torch.ones(2, 3), hidden_states=(torch.zeros(1), torch.ones(1))))
    doubled = jit(lambda o: jax.tree.map(lambda x: 2 * x, o))(output)
    assert isinstance(doubled, BaseModelOutput)
    assert_trees_close(doubled.last_hidden_state, jnp.full((2, 3), 2.0))
    assert_trees_close(doubled["hidden_states"], (jnp.zeros(1), jnp.full(1, 2.0)))
    assert doubled.attentions is None


@pytest.mark.parametrize(
    "value",
    [torch.distributions.Normal(torch.zeros(2), torch.ones(2)), torch.nn.Linear(2, 2), torch.Generator(), Inner],
    ids=["distribution", "module", "generator", "class"],
)
def test_object_that_no_pytree_registry_knows_is_a_leaf(value):
    assert to_jax([value])[0] is value


# --- records: dataclasses and caches --------------------------------------------------------------


def test_record_is_taken_apart_by_its_attributes():
    batch = to_jax(Batch(torch.ones(2), None))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path([batch])[0]]
    assert paths == ["[0].images"]
    assert "name='train'" in str(jax.tree.structure(batch))
    assert jax.tree.structure(batch) != jax.tree.structure(to_jax(Batch(torch.ones(2), None, "test")))


def test_every_attribute_may_hold_an_array_later():
    """JAX rebuilds records with anything in the place of arrays, and takes those apart again."""
    batch = to_jax(Batch(torch.ones(2), [torch.zeros(3), "static"]))
    structure = jax.tree.structure(batch)
    for stand_in in (False, 0, None, "label", (), object(), 1.5):
        rebuilt = jax.tree.unflatten(structure, [stand_in] * structure.num_leaves)
        assert (rebuilt.images, rebuilt.labels, rebuilt.name) == (stand_in, [stand_in] * 2, "train")
        assert jax.tree.leaves(rebuilt, is_leaf=lambda x: x is None or x == ()) == [stand_in] * 3
    assert jax.tree.structure(jax.tree.map(lambda x: x is batch, batch)) == structure


def test_containers_of_static_attributes_are_not_shared():
    given = to_jax(Batch(torch.ones(2), ["a", {"b": 1}]))
    rebuilt = jax.tree.map(lambda x: x, given)
    rebuilt.labels[1]["b"] = 2
    rebuilt.labels.append("c")
    assert given.labels == ["a", {"b": 1}]


def test_declared_order_then_alphabetical_whatever_was_set_first():
    @dataclass
    class Late:
        late: Any = field(init=False)
        early: Any = 1

    first, second = Late(torch.ones(1)), Late(torch.ones(1))
    first.late = first.z = first.a = second.a = second.z = second.late = torch.ones(1)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(to_jax(first))[0]]
    assert paths == [".late", ".early", ".a", ".z"]
    assert jax.tree.structure(first) == jax.tree.structure(second)


def test_empty_cache_is_a_tree():
    cache = DynamicCache()
    there = to_jax(cache)
    assert jax.tree.leaves(cache) == []
    assert there is not cache
    assert there.layers is not cache.layers
    assert jax.tree.structure(there) == jax.tree.structure(DynamicCache())


def test_threads_may_meet_a_class_at_once():
    for i in range(20):
        cls, barrier = make_dataclass(f"Met{i}", ["x"]), threading.Barrier(8)

        def convert(_: int, cls=cls, barrier=barrier) -> Any:
            barrier.wait()
            return to_jax(cls(torch.ones(1))).x

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(isinstance(x, jax.Array) for x in pool.map(convert, range(8)))


def test_error_counts_leaves():
    with pytest.raises(TypeError, match=r"leaf 2 is a meta tensor"):
        to_jax({"a": [torch.ones(1), 3], "b": torch.ones(1, device="meta")})


# --- properties ----------------------------------------------------------------------------------

leaves = st.one_of(
    st.tuples(st.sampled_from(NARROW), st.lists(st.integers(0, 3), max_size=3).map(tuple)).map(lambda x: sample(*x)),
    st.sampled_from([3, 1.5, False, "s", torch.int8]),
)
trees = st.recursive(
    st.one_of(leaves, st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Layer, leaves, st.sampled_from("xy")),  # Equinox flattens what it builds, and torchleaf's code is
        st.builds(Batch, inner, inner),  # type-checked at random samples, which strategies must not take
        st.builds(Inner, inner),
        st.builds(BaseModelOutput, last_hidden_state=leaves, hidden_states=st.lists(leaves, min_size=1).map(tuple)),
    ),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None, database=None)
@given(tree=trees, copy=st.booleans())
def test_round_trip_keeps_the_tree(tree, copy):
    there = to_jax(tree, copy=copy)
    back = to_torch(there, copy=copy)
    # to_jax has registered every class by now, so that jax.tree sees all leaves
    before, structure = jax.tree.flatten(tree)
    arrays, after = jax.tree.flatten(there), jax.tree.flatten(back)
    assert structure == arrays[1] == after[1]
    for old, array, new in zip(before, arrays[0], after[0], strict=True):
        if isinstance(old, torch.Tensor):
            assert isinstance(array, jax.Array)
            assert (new.dtype, new.shape) == (old.dtype, old.shape)
            assert raw_bytes(new) == raw_bytes(array) == raw_bytes(old)
        else:
            assert old is array is new
