"""LU factors and what is done with them, reflections, the pseudo-inverse."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..promotion import promoting
from ..table import op
from .linear import householder_product, solve_triangular


def _adjoint(x: Any) -> Any:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def _eye(x: Any, n: int) -> Any:
    return jnp.broadcast_to(jnp.eye(n, dtype=x.dtype), (*x.shape[:-2], n, n))


def _permutation(pivots: Any, n: int) -> Any:
    """Which row is where after the exchanges that pivots, counted from one, stand for."""
    return lax.linalg.lu_pivots_to_permutation(pivots.astype(jnp.int32) - 1, n)


def _factors(lu: Any) -> tuple[Any, Any]:
    """The lower factor, with ones on its diagonal, and the upper one."""
    rows, columns = lu.shape[-2:]
    k = min(rows, columns)
    return jnp.tril(lu[..., :, :k], -1) + jnp.eye(rows, k, dtype=lu.dtype), jnp.triu(lu[..., :k, :])


@op("lu_unpack")
def lu_unpack(lu: Any, pivots: Any, unpack_data: bool = True, unpack_pivots: bool = True, *, out: Any) -> Any:
    """The permutation and the two factors; what is not asked for is empty."""
    permutation, lower, upper = (jnp.zeros(aval.shape, aval.dtype) for aval in out)
    if unpack_pivots:
        at = _permutation(pivots, lu.shape[-2])
        permutation = jnp.swapaxes(jnp.eye(lu.shape[-2], dtype=lu.dtype)[at], -1, -2)
    if unpack_data:
        lower, upper = _factors(lu)
    return permutation, lower, upper


@op("linalg_lu")
def lu(x: Any, *, pivot: bool = True) -> Any:
    """`x = P @ L @ U`."""
    found, _, at = lax.linalg.lu(x)
    return jnp.swapaxes(jnp.eye(x.shape[-2], dtype=x.dtype)[at], -1, -2), *_factors(found)


@op("linalg_lu_solve")
def lu_solve(lu: Any, pivots: Any, b: Any, *, left: bool = True, adjoint: bool = False) -> Any:
    """A system by the LU factors of its matrix."""
    if not left:  # x a = b is a* x* = b*
        return _adjoint(lu_solve(lu, pivots, _adjoint(b), adjoint=not adjoint))
    lead = jnp.broadcast_shapes(lu.shape[:-2], b.shape[:-2])
    b = jnp.broadcast_to(b, (*lead, *b.shape[-2:]))
    at = jnp.broadcast_to(_permutation(pivots, lu.shape[-1]), (*lead, lu.shape[-1]))[..., None]
    if not adjoint:
        half = solve_triangular(lu, jnp.take_along_axis(b, at, axis=-2), upper=False, unitriangular=True)
        return solve_triangular(lu, half, upper=True)
    half = solve_triangular(_adjoint(lu), b, upper=False)
    found = solve_triangular(_adjoint(lu), half, upper=True, unitriangular=True)
    return jnp.take_along_axis(found, jnp.argsort(at, axis=-2), axis=-2)


@op("geqrf")
def geqrf(x: Any) -> Any:
    """R, and below it the reflections that Q is a product of; their factors."""
    reflections, factors = jnp.linalg.qr(x, "raw")
    return jnp.swapaxes(reflections, -1, -2), factors


@op("ormqr")
def ormqr(x: Any, tau: Any, other: Any, left: bool = True, transpose: bool = False) -> Any:
    """The product of a matrix with all columns of a product of reflections."""
    n = x.shape[-2]
    x = x[..., :n]
    whole = jnp.concatenate([x, jnp.zeros((*x.shape[:-1], n - x.shape[-1]), x.dtype)], -1)
    q = householder_product(whole, tau)
    q = _adjoint(q) if transpose else q
    return q @ other if left else other @ q


@op("linalg_pinv.atol_rtol_tensor")
def pinv(x: Any, *, atol: Any = None, rtol: Any = None, hermitian: bool = False) -> Any:
    """The pseudo-inverse, in which singular values below a bound count for none."""
    if not x.size:
        return jnp.swapaxes(x, -1, -2)
    if rtol is None:
        default = max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps)
        rtol = default if atol is None else jnp.where(jnp.asarray(atol) > 0, 0.0, default)
    bounds = (jnp.broadcast_to(jnp.asarray(b), x.shape[:-2]) for b in (0.0 if atol is None else atol, rtol))
    if hermitian:  # torch looks at the lower half alone
        x = jnp.tril(x) + _adjoint(jnp.tril(x, -1))
    return _pinv(x, *bounds)


@jax.custom_jvp
def _pinv(x: Any, atol: Any, rtol: Any) -> Any:
    u, s, vh = jnp.linalg.svd(x, full_matrices=False)
    kept = s > jnp.maximum(atol[..., None], rtol[..., None] * s[..., :1])
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    return _adjoint(vh) * inverse[..., None, :].astype(x.dtype) @ _adjoint(u)


@_pinv.defjvp
@promoting
def _(primals: Any, tangents: Any) -> Any:
    """By Golub and Pereyra, "The differentiation of pseudo-inverses" (1973)."""
    x, dx = primals[0], tangents[0]
    p = _pinv(*primals)
    first = (_eye(p, x.shape[-1]) - p @ x) @ _adjoint(dx) @ (_adjoint(p) @ p)
    second = (p @ _adjoint(p)) @ _adjoint(dx) @ (_eye(x, x.shape[-2]) - x @ p)
    return p, first + second - p @ dx @ p
