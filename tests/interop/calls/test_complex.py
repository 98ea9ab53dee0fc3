"""Complex values: every derivative equals that of the same function in jax.numpy, in JAX's convention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchleaf
import twins
from compare import assert_trees_close, eager_and_jit, torch_gradients
from twins import Twin

pytestmark = pytest.mark.both_engines(every=4)


def close(actual, expected, rtol=2e-4, atol=2e-5):
    assert_trees_close(actual, expected, rtol=rtol, atol=atol)


def draw(*shapes, seed=0):
    real, imag = twins.normal(*shapes, seed=seed), twins.normal(*shapes, seed=seed + 100)
    return tuple(r + 1j * i for r, i in zip(real, imag, strict=True))


# Complex to complex, holomorphic.
HOLOMORPHIC = {
    "product": Twin(lambda z, w: z * w + z**3, lambda z, w: z * w + z**3, ((3,), (3,))),
    "exp and sin": Twin(lambda z, w: torch.exp(z) * torch.sin(w), lambda z, w: jnp.exp(z) * jnp.sin(w), ((3,), (3,))),
    "matmul": Twin(lambda z, w: z @ w, lambda z, w: z @ w, ((2, 3), (3, 2))),
    "fft": Twin(lambda z, w: torch.fft.fft(z) * w, lambda z, w: jnp.fft.fft(z) * w, ((4,), (4,))),
    "ifft": Twin(lambda z, w: torch.fft.ifft2(z * w), lambda z, w: jnp.fft.ifft2(z * w), ((2, 3), (2, 3))),
}
# Complex to complex, not holomorphic.
NOT_HOLOMORPHIC = {
    "conj": Twin(lambda z, w: z.conj() * w, lambda z, w: z.conj() * w, ((3,), (3,))),
    "real part": Twin(lambda z, w: z.real * w, lambda z, w: z.real * w, ((3,), (3,))),
    "phase": Twin(lambda z, w: z / z.abs() + w.imag, lambda z, w: z / jnp.abs(z) + w.imag, ((3,), (3,))),
    "adjoint": Twin(lambda z, w: z.mH @ w, lambda z, w: z.conj().T @ w, ((2, 3), (2, 2))),
    "pseudo-inverse": Twin(
        lambda z, w: torch.linalg.pinv(z) @ w, lambda z, w: jnp.linalg.pinv(z) @ w, ((3, 2), (3, 2))
    ),
    "two outputs": Twin(lambda z, w: (z * w, w.conj()), lambda z, w: (z * w, w.conj()), ((3,), (3,))),
}
# Complex to real.
TO_REAL = {
    "abs": Twin(lambda z, w: (z * w).abs(), lambda z, w: jnp.abs(z * w), ((3,), (3,))),
    "angle": Twin(lambda z, w: torch.angle(z) * w.real, lambda z, w: jnp.angle(z) * w.real, ((3,), (3,))),
    "power": Twin(
        lambda z, w: torch.fft.fft(z).abs().square() + w.imag,
        lambda z, w: jnp.square(jnp.abs(jnp.fft.fft(z))) + w.imag,
        ((3,), (3,)),
    ),
    "view as real": Twin(
        lambda z, w: torch.view_as_real(z).sin(), lambda z, w: jnp.sin(jnp.stack([z.real, z.imag], -1)), ((3,), (3,))
    ),
}
# Real to complex and back.
FROM_REAL = {
    "complex": Twin(torch.complex, jax.lax.complex, ((3,), (3,))),
    "view as complex": Twin(
        lambda x, y: torch.view_as_complex(x) * y[:, 0],
        lambda x, y: (x[:, 0] + 1j * x[:, 1]) * y[:, 0],
        ((3, 2), (3, 2)),
    ),
    "rfft": Twin(lambda x, y: torch.fft.rfft(x * y), lambda x, y: jnp.fft.rfft(x * y), ((4,), (4,))),
    "filter": Twin(
        lambda x, y: torch.fft.irfft(torch.fft.rfft(x) * torch.exp(1j * y[:3]), n=5),
        lambda x, y: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.exp(1j * y[:3]), n=5),
        ((5,), (5,)),
    ),
    "polar": Twin(lambda x, y: torch.polar(x.exp(), y), lambda x, y: jnp.exp(x) * jnp.exp(1j * y), ((3,), (3,))),
}
ON_COMPLEX = HOLOMORPHIC | NOT_HOLOMORPHIC | TO_REAL


def loss(function):
    """A real scalar that weighs real and imaginary parts differently."""

    def run(*args):
        outs = [jnp.asarray(y) for y in jax.tree.leaves(function(*args))]
        return sum(jnp.sin(y.real).sum() + (jnp.cos(2 * y.imag).sum() if jnp.iscomplexobj(y) else 0) for y in outs)

    return run


def pullback(function, z, w):
    outs, pull = jax.vjp(function, z, w)
    return pull(jax.tree.map(lambda y: y * (2 - 1j if jnp.iscomplexobj(y) else 2), outs))


def transposed(function, z, w):
    outs, pushforward = jax.linearize(function, z, w)
    return pushforward(w_like(z), w_like(w)), jax.linear_transpose(pushforward, z, w)(outs)


def w_like(x):
    return jnp.cos(x.real) + 1j * jnp.sin(3 * x.real) if jnp.iscomplexobj(x) else jnp.cos(x)


def of_real_parts(function):
    """As a function of real numbers, for forward and reverse Jacobians and Hessians."""

    def run(parts):
        outs = jax.tree.leaves(function(*(re + 1j * im for re, im in parts)))
        return [jnp.stack([y.real, y.imag]) for y in outs]

    return run


def parts(*args):
    return [(z.real, z.imag) for z in args]


TRANSFORMS = {
    "value": lambda f, z, w: f(z, w),
    "grad": lambda f, z, w: jax.grad(loss(f), (0, 1))(z, w),
    "vjp": pullback,
    "jvp": lambda f, z, w: jax.jvp(f, (z, w), (w_like(z), w_like(w))),
    "linearize and transpose": transposed,
    "vmap of grad": lambda f, z, w: jax.vmap(jax.grad(loss(f), (0, 1)), (0, None))(jnp.stack([z, 2 * z]), w),
    "grad of vmap": lambda f, z, w: jax.grad(lambda z, w: loss(jax.vmap(f, (0, None)))(z, w), (0, 1))(
        jnp.stack([z, 2 * z]), w
    ),
    "forward over reverse": lambda f, z, w: jax.jvp(jax.grad(loss(f), (0, 1)), (z, w), (w_like(z), w_like(w))),
}


@pytest.mark.parametrize("twin", (ON_COMPLEX | FROM_REAL).values(), ids=ON_COMPLEX | FROM_REAL)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform(transform, twin):
    args = (draw if twin in ON_COMPLEX.values() else twins.normal)(*twin.shapes)
    actual = jax.jit(lambda *xs: transform(twin.ours, *xs))(*args)
    close(actual, jax.jit(lambda *xs: transform(twin.jax, *xs))(*args))


@pytest.mark.parametrize("twin", ON_COMPLEX.values(), ids=ON_COMPLEX)
@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev, lambda f: jax.jacrev(jax.jacfwd(f))])
def test_jacobians_over_real_parts(transform, twin):
    args = parts(*draw(*twin.shapes))
    close(jax.jit(transform(of_real_parts(twin.ours)))(args), jax.jit(transform(of_real_parts(twin.jax)))(args))


@eager_and_jit
@pytest.mark.parametrize("twin", HOLOMORPHIC.values(), ids=HOLOMORPHIC)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.jacfwd(f, (0, 1), holomorphic=True),
        lambda f: jax.jacrev(f, (0, 1), holomorphic=True),
        lambda f: jax.grad(lambda z, w: f(z, w).sum(), holomorphic=True),
        lambda f: jax.hessian(lambda z, w: f(z, w).sum(), holomorphic=True),
    ],
    ids=["jacfwd", "jacrev", "grad", "hessian"],
)
def test_holomorphic_derivatives(transform, twin, jit):
    z, w = draw(*twin.shapes)
    close(jit(transform(twin.ours))(z, w), jax.jit(transform(twin.jax))(z, w))


@pytest.mark.parametrize("twin", TO_REAL.values(), ids=TO_REAL)
def test_gradients_are_the_conjugates_of_torch_backward(twin):
    z, w = draw(*twin.shapes)
    close(
        jax.grad(lambda *xs: twin.ours(*xs).sum(), (0, 1))(z, w),
        torch_gradients(lambda *xs: twin.torch(*xs).sum(), z, w),
    )


def test_grad_of_a_complex_output_raises_as_in_jax():
    (z,) = draw((3,))
    with pytest.raises(TypeError, match="grad requires real-valued outputs"):
        jax.grad(torchleaf.torch_function(torch.sum))(z)


@eager_and_jit
def test_gradient_descent_goes_downhill(jit):
    """The convention matters: steps along the conjugate of JAX's gradient lower a loss through the FFT."""
    target, start = draw((4,), (4,))

    @torchleaf.torch_function
    def distance(z, target):
        return (torch.fft.fft(z) - target).abs().square().sum()

    step = jit(lambda z: z - 0.05 * jax.grad(distance)(z, target).conj())
    z = start
    for _ in range(60):
        z = step(z)
    close(z, jnp.fft.ifft(target), atol=1e-3)


@pytest.mark.parametrize("layout", ["conjugate", "negative", "real part", "broadcast"])
def test_lazy_views_as_outputs(layout):
    """torch returns conj() and imag as views with a bit set or strided; their values arrive."""
    functions = {
        "conjugate": (lambda z: z.conj(), jnp.conj),
        "negative": (lambda z: z.conj().imag, lambda z: -z.imag),
        "real part": (lambda z: z.real, jnp.real),
        "broadcast": (lambda z: z[:1].expand(3), lambda z: jnp.broadcast_to(z[:1], (3,))),
    }
    ours, twin = functions[layout]
    (z,) = draw((3,))
    function = torchleaf.torch_function(ours, vmap_method="loop")  # torch cannot batch negative views
    for transform in (lambda f: f(z), lambda f: jax.vmap(f)(jnp.stack([z, z * 1j])), lambda f: jax.vjp(f, z)[1](f(z))):
        close(transform(function), transform(twin))


@eager_and_jit
def test_mixed_real_and_complex_operands(jit):
    (x,), (z,) = twins.normal((3,)), draw((3,))

    def derivatives(f):
        return jit(lambda x, z: (jax.grad(loss(f), (0, 1))(x, z), jax.jvp(f, (x, z), (x, z)), pullback(f, x, z)))(x, z)

    close(derivatives(torchleaf.torch_function(lambda x, z: x * z)), derivatives(lambda x, z: x * z))


def test_complex128(x64):
    z, w = (np.asarray(x, np.complex128) for x in draw((4,), (4,)))
    z, w = jnp.asarray(z), jnp.asarray(w)

    def derivatives(f):
        def run(z, w):
            return f(z, w), jax.grad(loss(f), (0, 1))(z, w), jax.jvp(f, (z, w), (w, z)), pullback(f, z, w)

        return jax.jit(run)(z, w)

    twin = HOLOMORPHIC["fft"]
    actual = derivatives(torchleaf.torch_function(twin.torch))
    assert actual[0].dtype == jnp.complex128
    close(actual, derivatives(twin.jax), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 1)])
def test_odd_shapes(shape):
    (z,) = draw(shape)
    function = torchleaf.torch_function(lambda z: z * z.conj())
    close(jax.jit(function)(z), z * z.conj())
    close(jax.grad(loss(function))(z), jax.grad(loss(lambda z: z * z.conj()))(z))
