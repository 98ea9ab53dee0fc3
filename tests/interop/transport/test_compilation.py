"""Torch functions under custom derivatives, inner jits, ahead-of-time compilation, donation and shape evaluation."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close, eager_and_jit
from watching import Recorder


@pytest.fixture
def args():
    return twins.LAYER.arguments()


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=2e-4, atol=1e-5)


def total(function):
    return lambda *args: jnp.sin(function(*args)).sum()


# --- custom derivatives ------------------------------------------------------------------------------


def with_custom_vjp(function):
    """Clips the cotangent; forward and backward both call `function`."""
    clipped = jax.custom_vjp(function)

    def forward(*args):
        outs, pull = jax.vjp(function, *args)
        return outs, pull

    clipped.defvjp(forward, lambda pull, ct: pull(jnp.clip(ct, -0.1, 0.1)))
    return clipped


def with_custom_jvp(function):
    """A tangent rule with a torch call in it."""
    doubled = jax.custom_jvp(function)

    @doubled.defjvp
    def rule(primals, tangents):
        out, tangent = jax.jvp(function, primals, tangents)
        return out, 2 * tangent * function(*primals)

    return doubled


@pytest.mark.long
@eager_and_jit
@pytest.mark.parametrize("wrap", [with_custom_vjp, with_custom_jvp])
def test_custom_derivatives_around_it(wrap, args, jit):
    def derivatives(function):
        wrapped = wrap(function)
        batch = twins.normal((4, 3))[0]
        return jit(
            lambda *xs: (
                jax.value_and_grad(total(wrapped), (0, 1, 2))(*xs),
                jax.grad(lambda w: jax.vmap(lambda x: total(wrapped)(x, w, xs[2]))(batch).sum())(xs[1]),
            )
        )(*args)

    close(derivatives(twins.LAYER.ours), derivatives(twins.LAYER.jax))


def test_custom_jvp_in_forward_mode_and_hessian(args):
    def derivatives(function):
        wrapped = with_custom_jvp(function)
        return jax.jit(lambda *xs: (jax.jvp(wrapped, xs, xs), jax.hessian(total(wrapped))(*xs)))(*args)

    close(derivatives(twins.LAYER.ours), derivatives(twins.LAYER.jax))


def test_torch_as_the_rule_of_a_jax_function(args):
    """The backward pass of a JAX function computed in torch."""

    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, ct: (torchleaf.torch_function(lambda x, ct: 3 * x**2 * ct)(x, ct),))
    (x,) = twins.normal((4,))
    close(jax.jit(jax.grad(lambda x: cube(x).sum()))(x), 3 * x**2)


def test_stop_gradient_and_perturbations(args):
    def derivatives(function):
        return jax.jit(jax.grad(lambda x, w, b: total(function)(jax.lax.stop_gradient(x), w, b), (0, 1)))(*args)

    close(derivatives(twins.LAYER.ours), derivatives(twins.LAYER.jax))


# --- compilation -------------------------------------------------------------------------------------


@eager_and_jit
def test_inner_jit(args, jit):
    """Derivatives and batches of a jitted call inside a program, called twice."""

    def both(function):
        inner = jax.jit(function)

        def program(x, w, b):
            once = jax.grad(lambda w: total(inner)(x, w, b) + total(inner)(2 * x, w, b))(w)
            return once, jax.vmap(inner, (0, None, None))(jnp.stack([x, -x]), w, b), jax.jacfwd(inner)(x, w, b)

        return jit(program)(*args)

    close(both(twins.LAYER.ours), both(twins.LAYER.jax))


def test_inlined_and_unjitted_programs(args):
    """`inline=True`, and `jax.disable_jit`."""
    expected = jax.grad(total(twins.LAYER.jax), 1)(*args)
    close(jax.jit(jax.grad(total(jax.jit(twins.LAYER.ours, inline=True)), 1))(*args), expected)
    with jax.disable_jit():
        close(jax.grad(total(twins.LAYER.ours), 1)(*args), expected)


def test_static_arguments(args):
    function = torchleaf.torch_function(lambda x, power: x**power)
    program = jax.jit(lambda x, power: jax.grad(lambda x: function(x, power).sum())(x), static_argnums=1)
    close([program(args[0], n) for n in (2, 3)], [2 * args[0], 3 * args[0] ** 2])


def test_ahead_of_time(args):
    """Lowered from shapes alone, compiled, and called many times."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    lowered = jax.jit(jax.value_and_grad(total(twins.LAYER.ours), (0, 1, 2))).lower(*shapes)
    compiled = lowered.compile()
    for seed in range(3):
        xs = twins.LAYER.arguments(seed)
        close(compiled(*xs), jax.value_and_grad(total(twins.LAYER.jax), (0, 1, 2))(*xs))


def test_compiled_program_keeps_its_function_alive(args):
    """The torch function and every wrapper of it are gone; the executable still runs it."""

    def compile_one(scale):
        function = torchleaf.torch_function(lambda x: x.sin() * scale)
        return jax.jit(jax.grad(lambda x: function(x).sum())).lower(args[0]).compile()

    programs = [compile_one(s) for s in (1.0, 2.0)]
    jax.clear_caches()
    close([p(args[0]) for p in programs], [jnp.cos(args[0]), 2 * jnp.cos(args[0])])


def test_compile_time_evaluation(args):
    """A torch call on constants, run while JAX traces, decides what is traced."""
    order = torchleaf.torch_function(torch.argsort)

    @jax.jit
    def program(x):
        with jax.ensure_compile_time_eval():
            first = int(order(jnp.array([3.0, 1.0, 2.0]))[0])
        return x[first]

    close(program(args[0]), args[0][1])


def test_donated_operands():
    """Operands whose buffers XLA may reuse for the results of the torch call."""
    step = jax.jit(lambda w, g: twins.SCALAR.ours(w, g) * w - 0.1 * g, donate_argnums=0)
    twin = jax.jit(lambda w, g: twins.SCALAR.jax(w, g) * w - 0.1 * g)
    w, g = twins.SCALAR.arguments()
    expected = jnp.copy(w)
    for _ in range(3):
        donated, (w, expected) = w, (step(w, g), twin(expected, g))
        assert donated.is_deleted()
    close(w, expected)


def test_donation_to_the_call_itself():
    update = torchleaf.torch_function(lambda w, g: w.sub_(g))  # in place, on a copy
    w, g = twins.normal((64,), (64,))
    expected = w - g
    close(jax.jit(update, donate_argnums=0)(w, g), expected)
    assert w.is_deleted()


def test_eval_shape_does_not_compute(args):
    recorder = Recorder(lambda x, w, b: (twins.LAYER.torch(x, w, b), x.argmax()))
    ours = torchleaf.torch_function(recorder)
    expected = jax.eval_shape(lambda *xs: (twins.LAYER.jax(*xs), xs[0].argmax()), *args)
    assert jax.eval_shape(ours, *args) == expected
    grads = jax.eval_shape(jax.grad(lambda *xs: ours(*xs)[0].sum(), (0, 1, 2)), *args)
    assert grads == tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args)
    jax.jit(jax.hessian(lambda *xs: ours(*xs)[0])).lower(*args)
    assert recorder.computed == []


def test_jaxpr_is_one_call(args):
    jaxpr = jax.make_jaxpr(twins.LAYER.ours)(*args)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["torch_call"]


def test_one_trace_and_one_program_for_a_signature(args):
    recorder = Recorder(torch.sin)
    ours = torchleaf.torch_function(recorder, replay=False)
    program = jax.jit(ours)
    for _ in range(3):
        program(args[0])
        jax.jit(lambda x: ours(x) * 2)(args[0])
        ours(args[0])
    assert recorder.traced == [(3,)]
    assert recorder.computed == [(3,)] * 9
    assert program._cache_size() == 1
