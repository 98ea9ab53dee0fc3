"""Modules that keep tensors or state in attributes and hooks: forgotten after the call, or refused by name."""

import functools

import equinox as eqx
import jax
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from module_reference import eager_and_filter_jit, torch_gradients_of, weighted_sum
from torch import nn
from torchleaf import TorchCallError, TorchModule
from untouched import unchanged
from written_forwards import module_of, run

pytestmark = pytest.mark.both_engines(every=4)
X = torch.linspace(-1.5, 2, 6).reshape(2, 3)


# --- inputs --------------------------------------------------------------------------------------


def _attribute(self, x):
    self.last = x
    return self.linear(x)


def _view_in_attribute(self, x):
    self.last = x.t()[1:]
    return self.linear(x)


def _written_attribute(self, x):
    x += 1
    self.last = x
    return self.linear(x)


def _new_attribute(self, x):
    self.remembered = x
    return self.linear(x)


def _list_attribute(self, x):
    self.history.append(x)
    return self.linear(x)


def _dict_of_submodule(self, x):
    self.child.cache["x"] = x
    return self.linear(x)


def _nested_containers(self, x):
    self.child.cache["layers"] = [{"x": (x[0], None)}]
    return self.linear(x)


def _object_attribute(self, x):
    self.child.box.content = x
    return self.linear(x)


def _hook_sets_attribute():
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    module[1].register_forward_hook(lambda linear, args, output: setattr(linear, "seen", args[0]))
    return module


def _hook_of_closure():
    module, seen = nn.Sequential(nn.Identity(), nn.Linear(3, 3)), []
    module[1].register_forward_pre_hook(lambda linear, args: seen.append(args[0]))
    return module


KEEPERS = {
    "attribute": (_attribute, "attribute `last`"),
    "written": (_written_attribute, "attribute `last`"),
    "view": (_view_in_attribute, "attribute `last`"),
    "new-attribute": (_new_attribute, "attribute `remembered`"),
    "list": (_list_attribute, "attribute `history`"),
    "dict-of-submodule": (_dict_of_submodule, r"attribute `child\.cache`"),
    "nested": (_nested_containers, r"attribute `child\.cache`"),
    "object": (_object_attribute, r"attribute `child\.box\.content`"),
}


@eager_and_filter_jit
@pytest.mark.parametrize("transform", ["call", "grad", "vmap"])
@pytest.mark.parametrize(
    ("module", "message"),
    [
        *(pytest.param(functools.partial(module_of, f), message, id=name) for name, (f, message) in KEEPERS.items()),
        pytest.param(_hook_sets_attribute, r"attribute `1\.seen`", id="hook-sets-attribute"),
        pytest.param(_hook_of_closure, "argument input.*a closure, a global, a hook", id="hook-of-closure"),
    ],
)
def test_a_module_that_keeps_its_input(module, message, transform, jit):
    """The memory is JAX's and used again at once: the error says what keeps it and what to do."""
    module = module()
    model, x = TorchModule(module), from_torch(X)
    call = {
        "call": lambda m, x: m(x),
        "grad": eqx.filter_grad(lambda m, x: m(x).sum()),
        "vmap": lambda m, x: jax.vmap(m)(x[None]),
    }[transform]
    with unchanged(model, x, torch_module=module), pytest.raises(TorchCallError, match=rf"{message}.*clone\(\)"):
        jax.block_until_ready(jit(call)(model, x))
    assert getattr(module, "last", None) is None
    assert not getattr(module, "history", None)


def _clone_in_attribute(self, x):
    self.last = x.clone()
    return self.linear(x) + self.last


def _intermediate_in_attribute(self, x):
    self.last = self.linear(x)
    self.last += 1
    return torch.tanh(self.last)


def _attribute_taken_back(self, x):
    self.last = x
    y = self.linear(self.last)
    self.last = None
    return y


def _written_when_kept_as_clone(self, x):
    self.last = x
    self.last = self.last.clone()
    x.zero_()
    return self.linear(self.last)


def _weight_in_attribute(self, x):
    self.last = self.linear.weight
    return x @ self.last


def _computed_once(self, x):
    if self.last is None:
        self.last = self.linear.weight.norm()
    return self.linear(x) / self.last


def _late_buffer(self, x):
    self.child.register_buffer("late", self.linear.weight.norm() + x.sum(), persistent=False)
    return self.linear(x) / self.child.late


def _filled_buffer(self, x):
    if self.temporary is None:
        self.temporary = self.linear.weight.norm()
    return self.linear(x) / self.temporary


def _filled_buffer_of_values(self, x):
    if x.sum() < 1e9 and self.temporary is None:
        self.temporary = self.linear.weight.norm()
    return self.linear(x) / self.temporary


@eager_and_filter_jit
@pytest.mark.parametrize(
    "forward",
    [
        _clone_in_attribute,
        _intermediate_in_attribute,
        _attribute_taken_back,
        _written_when_kept_as_clone,
        _weight_in_attribute,
        _computed_once,
        _late_buffer,
        _filled_buffer,
        _filled_buffer_of_values,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_what_a_call_keeps_for_itself_is_forgotten(forward, jit):
    """Every call is the first one."""
    module = module_of(forward)
    model, call = TorchModule(module), jit(lambda m, x: m(x))
    for factor in (1, -2):
        weights = jax.tree.map(lambda a, factor=factor: a * factor if eqx.is_array(a) else a, model)
        x = from_torch(X * factor)
        with unchanged(weights, x, torch_module=module):
            y = call(weights, x)
            grads = jit(eqx.filter_grad(lambda m, x: weighted_sum(m(x))))(weights, x)
        twin = torchleaf.to_torch_module(weights)
        assert_trees_close(y, from_torch(run(twin, X * factor)))
        assert_trees_close(grads.params, torch_gradients_of(twin, twin, (X * factor,), {})[0])


@pytest.mark.torch_engine  # memory of what was computed
@eager_and_filter_jit
def test_a_hook_that_keeps_what_the_module_computed(jit):
    """As for extracting features: torch's own memory, which stays when JAX's is gone."""
    module, seen = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), []
    module[0].register_forward_hook(lambda linear, args, output: seen.append(output.detach()))
    model, call = TorchModule(module, replay=False), jit(lambda m, x: m(x))
    for factor in (1, 2, 3):
        jax.block_until_ready(call(model, from_torch(X * factor)))
        assert_trees_close(from_torch(seen[-1]), from_torch(module[0](X * factor)))


# --- state and structure -------------------------------------------------------------------------


def _new_parameter(self, x):
    self.linear.weight = nn.Parameter(self.linear.weight * 0.5)
    return self.linear(x)


def _deletes_parameter(self, x):
    weight = self.linear.weight
    del self.linear.weight
    return x @ weight


def _new_submodule(self, x):
    y = self.linear(self.child(x))
    self.child = nn.Tanh()
    return y


def _counter_in_an_object(self, x):
    self.child.box.content = (self.child.box.content or 0) + 1
    return self.linear(x) * self.child.box.content


def _new_state(self, x):
    self.child.register_buffer("late", x.sum())
    return self.linear(x)


def _tensor_in_an_object(self, x):
    before, self.child.box.content = self.child.box.content, 2 * x
    return x if before is None else x + before


@eager_and_filter_jit
@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (_new_parameter, r"linear\.weight"),
        (_deletes_parameter, r"linear\.weight"),
        (_new_submodule, "attribute `child`"),
        (_counter_in_an_object, r"attribute `child\.box\.content`"),
        (_tensor_in_an_object, r"attribute `child\.box\.content`"),
        (_new_state, r"attribute `child\.late`"),
    ],
    ids=lambda x: x.__name__.strip("_") if callable(x) else "",
)
def test_a_forward_whose_changes_would_be_lost(forward, message, jit):
    module = module_of(forward)
    model, x = TorchModule(module), from_torch(X)
    with unchanged(model, x, torch_module=module), pytest.raises(Exception, match=message):
        jax.block_until_ready(jit(lambda m, x: m(x))(model, x))
