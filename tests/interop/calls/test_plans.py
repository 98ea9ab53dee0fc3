"""A transform of torch.func is used only where it gives what torch.autograd and single examples give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
import twins
from compare import RUNS, assert_trees_close, eager_and_jit
from torchleaf.interop.calls.residuals import live_graphs

loops = pytest.mark.filterwarnings("ignore:vmap of .* runs as a loop")
SHAPE = (4,)


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- forward mode that is silently zero --------------------------------------------------------------------------


@torch.library.custom_op("torchleaf_tests::cube", mutates_args=())
def cube(a: torch.Tensor) -> torch.Tensor:
    return a * a * a


cube.register_fake(torch.empty_like)
cube.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Square(torch.autograd.Function):
    """`x**2` in torch's newer style, with every rule, of which torch.func.jvp uses one once only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def products(v):
    return torch.ones(2).scatter_reduce(0, torch.tensor([0, 1, 1, 0]), v, "prod")


def products_jax(v):
    return jnp.stack([v[0] * v[3], v[1] * v[2]])


def sparse_product(v):
    matrix = torch.sparse_coo_tensor(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 2]]), v, (3, 3), check_invariants=False)
    return torch.sparse.mm(matrix, torch.arange(6.0).reshape(3, 2)).sin()


def sparse_product_jax(v):
    matrix = jnp.zeros((3, 3)).at[jnp.array([0, 1, 1, 2]), jnp.array([1, 0, 2, 2])].add(v)
    return jnp.sin(matrix @ jnp.arange(6.0).reshape(3, 2))


WITHOUT_FORMULA = {
    "custom op": twins.Twin(cube, lambda v: v**3, (SHAPE,)),
    "custom op within others": twins.Twin(
        lambda v: cube(v.sin()).cumsum(0), lambda v: jnp.cumsum(jnp.sin(v) ** 3), (SHAPE,)
    ),
    "products by index": twins.Twin(products, products_jax, (SHAPE,)),
    "old style": twins.Twin(OldStyle.apply, lambda v: v**3, (SHAPE,)),
    "twice": twins.Twin(lambda v: Square.apply(Square.apply(v)), lambda v: v**4, (SHAPE,)),
}
SPARSE = twins.Twin(sparse_product, sparse_product_jax, (SHAPE,))
FORWARD = {
    "jvp": lambda f, v: jax.jvp(f, (v,), (jnp.cos(v),)),
    "jacfwd": lambda f, v: jax.jacfwd(f)(v),
    "linearize": lambda f, v: jax.linearize(f, v)[1](jnp.cos(v)),
    "hessian": lambda f, v: jax.hessian(lambda v: jnp.sin(f(v)).sum())(v),
    "forward twice": lambda f, v: jax.jacfwd(jax.jacfwd(f))(v),
    "reverse over forward": lambda f, v: jax.jacrev(lambda v: jax.jvp(f, (v,), (jnp.cos(v),))[1])(v),
    "vmap of jvp": lambda f, v: jax.vmap(lambda v: jax.jvp(f, (v,), (v,))[1])(jnp.stack([v, 2 * v, v + 1])),
    "vmap of gradient": lambda f, v: jax.vmap(jax.grad(lambda v: jnp.sin(f(v)).sum()))(jnp.stack([v, 2 * v, v + 1])),
}


FIRST = ("jvp", "jacfwd", "linearize", "vmap of jvp", "vmap of gradient")


@loops
@eager_and_jit
@pytest.mark.parametrize("twin", WITHOUT_FORMULA.values(), ids=WITHOUT_FORMULA)
@pytest.mark.parametrize("transform", FORWARD.values(), ids=FORWARD)
def test_ops_that_torch_func_lets_tangents_through_as_zero(transform, twin, jit):
    (v,) = twin.arguments()
    close(jit(lambda v: transform(twin.ours, v))(v), transform(twin.jax, v))


@loops
@eager_and_jit
@pytest.mark.parametrize("transform", FORWARD.values(), ids=FORWARD)
def test_a_backward_pass_that_torch_cuts_off_from_its_own_derivative(transform, jit):
    """Alone and beside a path that is not cut: torch.autograd gives zero, and half of what is right."""
    (v,) = SPARSE.arguments()
    for add in (0.0, 1.0):
        ours = torchleaf.torch_function(lambda v, add=add: sparse_product(v) + add * v.square().sum())

        def twin(v, add=add):
            return sparse_product_jax(v) + add * jnp.square(v).sum()

        if transform in [FORWARD[name] for name in FIRST]:
            close(jit(lambda v, f=ours: transform(f, v))(v), transform(twin, v))
        else:
            with pytest.raises(Exception, match=r"cuts the graph of gradients at SparseCoo.*by other ops"):
                jax.block_until_ready(jit(lambda v, f=ours: transform(f, v))(v))


@eager_and_jit
def test_a_first_run_where_the_derivative_is_zero_proves_nothing(jit):
    """The derivative of a cube at zero is what forward mode gives: nothing."""
    slope = jit(lambda x: jax.jvp(torchleaf.torch_function(cube), (x,), (jnp.ones(3),))[1])
    close(slope(jnp.zeros(3)), jnp.zeros(3))
    close(slope(jnp.full(3, 2.0)), jnp.full(3, 12.0))


@eager_and_jit
def test_a_first_tangent_of_zero_proves_nothing(jit):
    slope = jit(lambda x, t: jax.jvp(torchleaf.torch_function(cube), (x,), (t,))[1])
    x = jnp.array([1.0, 2.0])
    close(slope(x, jnp.zeros(2)), jnp.zeros(2))
    close(slope(x, jnp.ones(2)), 3 * x**2)


# --- batching that is silently wrong -----------------------------------------------------------------------------


def fill(a, v):
    return a.index_fill(0, torch.tensor([1]), v)


def hooked(x):
    """A tensor hook, which torch.func.vmap does not attach."""
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda g: 3 * g)
    return y**2


@jax.custom_vjp
def tripled(x):
    return x


tripled.defvjp(lambda x: (x, None), lambda _, g: (3 * g,))


def asks_for_gradients(x):
    """Straight-through rounding, done by hand where gradients are recorded."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvps(lambda t, _, x: t)


@loops
@eager_and_jit
def test_a_nested_batching_rule_that_is_wrong(jit):
    a, v = jnp.arange(6.0).reshape(2, 3), jnp.array([10.0, 20.0])

    def nested(f):
        return jit(jax.vmap(lambda a: jax.vmap(lambda v: f(a, v))(v)))(a)

    close(nested(torchleaf.torch_function(fill)), nested(lambda a, v: a.at[1].set(v)))


@loops
@eager_and_jit
def test_such_a_rule_shows_only_where_examples_differ(jit):
    """A first run on equal examples, as models are initialised on zeros."""
    nested = jit(lambda a, v: jax.vmap(lambda a: jax.vmap(lambda v: torchleaf.torch_function(fill)(a, v))(v))(a))
    nested(jnp.zeros((2, 3)), jnp.zeros(2))
    a, v = jnp.arange(6.0).reshape(2, 3), jnp.array([10.0, 20.0])
    close(nested(a, v), jax.vmap(lambda a: jax.vmap(lambda v: a.at[1].set(v))(v))(a))


@pytest.mark.long
@loops
@eager_and_jit
@pytest.mark.parametrize("residuals", ["live", "recompute"])
@pytest.mark.parametrize(
    ("ours", "twin"),
    [(hooked, lambda x: tripled(jnp.sin(x)) ** 2), (asks_for_gradients, straight_through)],
    ids=["tensor hook", "requires_grad"],
)
def test_values_under_vmap_are_right_and_gradients_are_not(ours, twin, residuals, jit):
    ours = torchleaf.torch_function(ours, residuals=residuals)
    x = jnp.linspace(0.2, 1.7, 8).reshape(4, 2)
    for transform in (
        lambda f: jax.grad(lambda x: (jax.vmap(f)(x) * jnp.cos(x)).sum()),
        lambda f: jax.vmap(jax.grad(lambda x: (f(x) * jnp.cos(x)).sum())),
        lambda f: jax.grad(lambda x: (jax.vmap(jax.vmap(f))(x) * jnp.cos(x)).sum()),
    ):
        close(jit(transform(ours))(x), transform(twin)(x))


@eager_and_jit
def test_vmap_that_must_not_loop_is_refused_where_it_is_wrong(jit):
    only = torchleaf.torch_function(hooked, vmap_method="vmap")
    x = jnp.ones((3, 2))
    close(jit(jax.vmap(only))(x), jnp.sin(x) ** 2)
    with pytest.raises(Exception, match=r"torch.func.vmap cannot batch it .*other values.*vmap_method='auto'"):
        jax.block_until_ready(jit(jax.grad(lambda x: jax.vmap(only)(x).sum()))(x))
    loop = torchleaf.torch_function(hooked, vmap_method="loop")
    close(jax.grad(lambda x: jax.vmap(loop)(x).sum())(x), 3 * jnp.sin(2 * x))


def test_the_warning_says_why():
    with pytest.warns(
        UserWarning, match=r"runs as a loop over 3 examples .*other values, output 0 is off by"
    ) as caught:
        jax.block_until_ready(jax.grad(lambda x: jax.vmap(torchleaf.torch_function(hooked))(x).sum())(jnp.ones((3, 2))))
    assert len(caught) == 1


# --- what a proof leaves alone -----------------------------------------------------------------------------------


class Counted:
    """How often Python runs."""

    def __init__(self, function):
        self.function, self.runs = function, 0

    def __call__(self, *args):
        self.runs += 1
        return self.function(*args)


def vmapped_slope(f):
    return jax.vmap(lambda x: jax.jvp(f, (x,), (x,))[1])


def test_a_proof_is_made_once():
    counted = Counted(torch.tanh)
    program = jax.jit(vmapped_slope(torchleaf.torch_function(lambda x: counted(x), replay=False)))
    x = jnp.ones((3, 2))
    jax.block_until_ready(program(x))
    first = counted.runs
    for _ in range(RUNS):
        jax.block_until_ready(program(x))
    assert counted.runs == first + RUNS


def test_a_proof_is_not_recorded():
    """Two runs are recorded; the third does without Python."""
    counted = Counted(torch.tanh)
    program = jax.jit(vmapped_slope(torchleaf.torch_function(lambda x: counted(x))))
    x = jnp.linspace(0.0, 1.0, 6).reshape(3, 2)
    expected = (1 - jnp.tanh(x) ** 2) * x
    results = [jax.block_until_ready(program(x)) for _ in range(2)]
    runs = counted.runs
    results += [jax.block_until_ready(program(x)) for _ in range(RUNS)]
    assert counted.runs == runs
    for result in results:
        close(result, expected)


def test_generators_and_graphs_are_left_alone():
    x = jnp.ones((3, 2))
    before = torch.get_rng_state(), np.random.get_state()[1], live_graphs()
    jax.block_until_ready(jax.hessian(lambda x: jax.vmap(torchleaf.torch_function(torch.tanh))(x).sum())(x))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert_trees_close(np.random.get_state()[1], before[1])
    assert live_graphs() == before[2]


def test_each_example_draws_from_its_own_key_in_a_proof_too():
    """No warning: what a key gives is the same in a batch and alone."""
    noisy = torchleaf.torch_function(lambda x: torch.nn.functional.dropout(x, 0.5).sin())
    keys, x = jax.random.split(jax.random.key(0), 3), jnp.ones((3, 20))

    def slopes(x):
        return jax.vmap(lambda x, key: jax.jvp(lambda x: noisy(x, key=key), (x,), (x,))[1])(x, keys)

    def alone(x, key):
        return jax.jvp(lambda x: noisy(x, key=key), (x,), (x,))[1]

    one_by_one = jnp.stack([alone(*example) for example in zip(x, keys, strict=True)])
    close(slopes(x), one_by_one)


def test_operands_that_no_plan_can_do_decide_nothing():
    """The next run, on other values, uses the batched plan: no warning."""
    program = jax.jit(jax.vmap(torchleaf.torch_function(torch.linalg.cholesky)))
    with pytest.raises(Exception, match="not positive-definite"):
        jax.block_until_ready(program(-jnp.eye(2)[None].repeat(3, 0)))
    close(program(4 * jnp.eye(2)[None].repeat(3, 0)), 2 * jnp.eye(2)[None].repeat(3, 0))


@eager_and_jit
def test_zeros_by_rounding_are_no_disagreement(jit):
    """The gradient of a normalised sum is zero, but for rounding: no warning."""
    ours = torchleaf.torch_function(lambda x: torch.nn.functional.layer_norm(x, (8,)).sum())
    x = twins.normal((5, 8))[0]
    gradient = jit(jax.vmap(jax.grad(ours)))(x)
    assert jnp.abs(gradient).max() < 1e-5
