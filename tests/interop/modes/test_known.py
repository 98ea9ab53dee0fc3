"""Constants in a trace: their values are known, what is computed of them too, and nothing is written into them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
from compare import assert_trees_close, from_torch
from samples import as_torch
from torch import nn
from torch.nn.utils import rnn
from torchleaf import StateError, torch_function
from torchleaf.interop.modes.fake_run import fake_mode

RUNS = 4
X = jnp.arange(12.0).reshape(4, 3) / 5 - 1

START = torch.tensor(1)
DEGREES = torch.tensor([0, 1, 1, 2])
MASK = torch.tensor([True, False, True, True])
EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
LENGTHS = torch.tensor([3, 2, 2, 1])
TABLE = torch.linspace(0, 1, 4)
BY_NUMPY = torch.from_numpy(np.array([2, 0, 1]))


def narrowed(x):
    return x.narrow(0, START, 2)


def spread(x):
    return x.new_zeros(int(DEGREES.max()) + 1, 3).index_add(0, DEGREES, x)


def masked(x):
    return x[MASK] * 2


def masked_selection(x):
    return x.masked_select(MASK[:, None])


def found_rows(x):
    return x[torch.nonzero(MASK)[:, 0]]


def repeated(x):
    return x.repeat_interleave(DEGREES, 0)


def propagated(x):
    n = int(EDGES.max()) + 1
    degree = torch.zeros(n).index_add_(0, EDGES[1], torch.ones(EDGES.shape[1]))
    weight = degree.rsqrt()
    weight[weight == float("inf")] = 0
    out = torch.zeros(n, x.shape[1])
    return out.index_add_(0, EDGES[1], x[EDGES[0]] * (weight[EDGES[0]] * weight[EDGES[1]])[:, None])


def chosen(x):
    return x.sin() if bool((TABLE > 0.9).any()) else x.cos()


def listed(x):
    return sum(x[i] for i in DEGREES.unique().tolist())


def asserted(x):
    assert torch.equal(TABLE, TABLE.clone())
    torch._assert(bool((DEGREES >= 0).all()), "degrees")
    return x * TABLE[:3]


def positions(x):
    ids = torch.arange(x.shape[0])
    return x * ids[:, None] if ids.max() < 10 else x


def causal(x):
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    scores = (x @ x.T).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) if not mask.all() else scores


def all_ones_like(x):
    mask = torch.ones_like(x, dtype=torch.long)
    return x * 2 if bool(mask.all()) else x[mask == 1]


def by_numpy(x):
    return x[:, BY_NUMPY] + float(BY_NUMPY.numpy().max())


def split(x):
    return torch.cat([part.sum(0) for part in torch.split(x, torch.tensor([1, 3]).tolist())])


def counted(x):
    return x.repeat(len(torch.bincount(DEGREES)), 1)


def cumulated(x):
    ends = torch.cumsum(torch.tensor([1, 2, 1]), 0)
    return torch.stack([x[: int(end)].sum(0) for end in ends])


def scalar_arithmetic(x):
    return x * (torch.tensor(2.0) ** torch.tensor(3.0)).item()


def packed(x):
    sequence = rnn.pack_padded_sequence(x[:, :, None], LENGTHS, batch_first=True)
    return rnn.pad_packed_sequence(sequence, batch_first=True)[0]


def sorted_by_a_table(x):
    order = TABLE.argsort(descending=True)
    return x[order] if int(order[0]) == 3 else x


CONSTANT = {
    f.__name__: f
    for f in (
        *(narrowed, spread, masked, masked_selection, found_rows, repeated, propagated, chosen, listed, asserted),
        *(positions, causal, all_ones_like, by_numpy, split, counted, cumulated, scalar_arithmetic, packed),
        *(sorted_by_a_table,),
    )
}
constant = pytest.mark.parametrize("name", CONSTANT)


@constant
@pytest.mark.filterwarnings("ignore:vmap of .*runs as a loop")
def test_values_of_constants(name):
    """Under every transformation, and without running it on examples."""
    function = CONSTANT[name]
    wrapped = torch_function(function)
    program, step = jax.jit(wrapped), jax.jit(jax.grad(lambda x: (wrapped(x) ** 2).sum()))
    for run in range(RUNS):
        leaf = as_torch(X + run).requires_grad_()
        y = function(leaf)
        (y**2).sum().backward()
        assert_trees_close(program(X + run), from_torch(y))
        assert_trees_close(step(X + run), from_torch(leaf.grad), rtol=1e-4)
    expected = from_torch(torch.stack([function(as_torch(X)), function(as_torch(X + 1))]))
    assert_trees_close(jax.vmap(wrapped)(jnp.stack([X, X + 1])), expected, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in CONSTANT if n != "packed"])  # a kernel of it writes past the dispatcher
def test_such_functions_do_the_same_for_all_values(name):
    """So that derivatives and batches of them need no certain route, and programs replay them."""
    runs = []

    def function(x):
        runs.append(type(x))
        return CONSTANT[name](x)

    program = jax.jit(torch_function(function))
    program.lower(X)
    assert all(issubclass(cls, torch._subclasses.FakeTensor) for cls in runs)


# --- what makes a constant unknown -------------------------------------------------------------------


def written_by_an_operand(x):
    y = torch.zeros(3)
    y.copy_(x[0])
    return x * y.sum().item()


def written_through_a_view(x):
    y = torch.zeros(4)
    view = y[1:]
    y[2] = x[0, 0]
    return x * view[1].item()


def written_as_out(x):
    y = torch.zeros(3)
    torch.sum(x, 0, out=y)
    return x * float(y.max())


def accumulated(x):
    y = TABLE.clone()
    y += x[:, 0]
    return x * y.max().item()


def written_and_listed(x):
    y = torch.zeros(3)
    y[0] = x[0, 0]
    return x + max(y.tolist())


def written_and_given_to_numpy(x):
    y = torch.zeros(3)
    y[0] = x[0, 0]
    return x + float(np.abs(y.detach().numpy()).max())


def drawn(x):
    y = torch.zeros(3).uniform_()
    return x * (y.sum().item() * 0 + 1)


UNKNOWN = [
    *(written_by_an_operand, written_through_a_view, written_as_out, accumulated, written_and_listed),
    written_and_given_to_numpy,
]


@pytest.mark.parametrize("function", UNKNOWN)
def test_constants_into_which_something_unknown_is_written(function):
    program = jax.jit(torch_function(function))
    for run in range(2 * RUNS):
        x = X * (run - 3) + run
        with torch.no_grad():
            assert_trees_close(program(x), from_torch(function(as_torch(x))))


def test_random_numbers_are_no_constants():
    program = jax.jit(torch_function(drawn))
    assert_trees_close(program(X, key=jax.random.key(0)), X)


def test_constants_that_are_written_go_on():
    """In place, by views, under autograd: the result is torch's."""

    def function(x):
        out = torch.zeros(4, 3)
        out[0] = x[0]
        row = out[1:3]
        row += x[1:3] * 2
        out[3].copy_(x[3])
        out.t()[0] *= 3
        kept = out[0].clone()
        out.mul_(2)
        return out, kept, row.sum(0)

    def total(outs):
        return sum((y**2).sum() for y in outs)

    wrapped = torch_function(function)
    step = jax.jit(jax.value_and_grad(lambda x: total(wrapped(x))))
    for run in range(RUNS):
        leaf = as_torch(X + run).requires_grad_()
        value = total(function(leaf))
        value.backward()
        assert_trees_close(step(X + run), from_torch((value, leaf.grad)), rtol=1e-4)


# --- captured tensors stay as they are ---------------------------------------------------------------


def _in_place(captured, x):
    captured.add_(1)
    return x + captured


def _by_a_view(captured, x):
    captured[0].fill_(5)
    return x + captured


def _by_a_view_of_a_view(captured, x):
    captured.view(-1)[:2].mul_(2)
    return x + captured


def _by_out(captured, x):
    torch.add(captured, 1, out=captured)
    return x + captured


def _by_an_operand(captured, x):
    captured.copy_(x[0])
    return x + captured


WRITES = [_in_place, _by_a_view, _by_a_view_of_a_view, _by_out, _by_an_operand]


@pytest.mark.parametrize("reads", [False, True], ids=["steady", "reads values"])
@pytest.mark.parametrize("write", WRITES)
def test_writes_into_captured_tensors_are_refused(write, reads):
    captured = torch.ones(3)

    def function(x):
        return write(captured, x * x.sum().item() if reads else x)

    for transform in (lambda f: f, jax.jit):
        with pytest.raises(
            StateError, match=r"function writes into a tensor of shape .*captured.*Pass it as an argument"
        ):
            transform(torch_function(function))(X)
    assert torch.equal(captured, torch.ones(3))


def test_a_captured_tensor_that_is_read_and_changes():
    """Its value is part of no program."""
    factor = torch.tensor(2.0)

    def function(x):
        return x * factor.item() if factor > 0 else x.exp()

    program = jax.jit(torch_function(function))
    for run in range(2 * RUNS):
        factor.fill_(run - 3)
        assert_trees_close(program(X), from_torch(function(as_torch(X))))


def test_a_captured_module_that_is_read_and_trained():
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def function(x):
        return module(x) * float(module[0].weight.detach().abs().max())

    program = jax.jit(torch_function(function))
    for _ in range(2 * RUNS):
        assert_trees_close(program(X), from_torch(function(as_torch(X))))
        with torch.no_grad():
            module[0].weight.mul_(-1.5)


def test_what_a_cache_keeps_of_a_trace_is_a_real_tensor():
    """As of positions and masks, made in the first call and kept for all, also outside of JAX."""

    @functools.lru_cache
    def table(n):
        return torch.arange(n).float().tril() if n < 0 else torch.arange(n).float() * 2

    program = jax.jit(torch_function(lambda x: x * table(3)))
    for run in range(RUNS):
        assert_trees_close(program(X + run), (X + run) * jnp.arange(3.0) * 2)
    assert torch.equal(table(3), torch.arange(3.0) * 2)


# --- bounds --------------------------------------------------------------------------------------------


def test_large_constants_are_not_computed():
    with fake_mode() as mode:
        assert mode.is_our_fake(torch.zeros(2**21))
        assert mode.is_our_fake(torch.ones(2**11, 1) * torch.ones(1, 2**11))
        assert not mode.is_our_fake(torch.ones(2**9, 1) * torch.ones(1, 2**9))
        assert mode.is_our_fake(torch.rand(3))
        assert mode.is_our_fake(torch.empty(3))
        assert mode.is_our_fake(torch.ones(2**9, 2**9) @ torch.ones(2**9, 2**9))


def test_large_captured_tensors_may_be_read():
    edges = torch.arange(2**21) % 1000
    function = torch_function(lambda x: x.new_zeros(int(edges.max()) + 1))
    assert jax.jit(function)(X).shape == (1000,)


# --- packed sequences ----------------------------------------------------------------------------------


class Packed(nn.Module):
    """Lengths that are known, as a list or a constant."""

    def __init__(self, lengths):
        super().__init__()
        self.rnn, self.lengths = nn.GRU(2, 3, batch_first=True), lengths

    def forward(self, x):
        sequence = rnn.pack_padded_sequence(x, self.lengths, batch_first=True)
        output, hidden = self.rnn(sequence)
        return rnn.pad_packed_sequence(output, batch_first=True)[0], hidden


@pytest.mark.parametrize("lengths", [[3, 2, 2, 1], LENGTHS], ids=["list", "tensor"])
def test_packed_sequences_of_known_lengths(lengths):
    module = Packed(lengths)
    model = torchleaf.TorchModule(module)
    program = jax.jit(lambda x: model(x))
    for run in range(RUNS):
        x = torch.randn(4, 3, 2)
        assert_trees_close(program(torchleaf.to_jax(x) + run), from_torch(module(x + run)), atol=1e-5)
