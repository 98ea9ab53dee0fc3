"""Products of matrices, and linear algebra."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..dtypes import Number, cast, opmath
from ..table import op
from .elementwise import absolute
from .reductions import root


def product(x: Any, y: Any, *, is_transposed: bool = False) -> Any:
    """`x @ y`; half precision is summed in single, and integers in their own dtype.

    With `is_transposed`, y is a matrix, or a batch of matrices, whose last two axes are to be exchanged.
    """
    dtype = jnp.promote_types(x.dtype, y.dtype)
    x, y, wide = cast(x, dtype), cast(y, dtype), opmath(dtype)
    if not is_transposed:
        return jnp.matmul(x, y, preferred_element_type=wide)
    y = y[0] if y.ndim > 2 and y.shape[0] == 1 else y
    if y.ndim > 2 and x.shape[:-2] != y.shape[:-2]:
        return jnp.matmul(x, jnp.swapaxes(y, -1, -2), preferred_element_type=wide)
    batch = tuple(range(y.ndim - 2))
    contracted = (x.ndim - 1,), (y.ndim - 1,)
    return lax.dot_general(x, y, (contracted, (batch, batch)), preferred_element_type=wide)


@op("mm", "bmm", "matmul", "mv", "dot")
def matmul(x: Any, y: Any, *, is_transposed: bool = False) -> Any:
    """The product of matrices, batches of them, and vectors."""
    return product(x, y, is_transposed=is_transposed)


@op("vdot")
def vdot(x: Any, y: Any) -> Any:
    """The inner product, the first vector conjugated."""
    return product(jnp.conj(x), y)


@op("linear")
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """`x @ weight.T + bias`."""
    result = product(x, weight, is_transposed=weight.ndim == 2)
    return result if bias is None else result + bias


def _sum(x: Any, product: Any, beta: Number, alpha: Number) -> Any:
    product = product if alpha == 1 else product * alpha
    if beta == 0:  # what x is does not matter, be it NaN
        return product
    return product + (x if beta == 1 else x * beta)


@op("addmm", "addmv", "baddbmm")
def addmm(x: Any, a: Any, b: Any, *, beta: Number = 1, alpha: Number = 1, is_transposed: bool = False) -> Any:
    """`beta * x + alpha * (a @ b)`."""
    return _sum(x, product(a, b, is_transposed=is_transposed), beta, alpha)


@op("addbmm")
def addbmm(x: Any, a: Any, b: Any, *, beta: Number = 1, alpha: Number = 1) -> Any:
    """The same with the products of a batch summed."""
    return _sum(x, jnp.sum(product(a, b), 0), beta, alpha)


@op("addr")
def addr(x: Any, a: Any, b: Any, *, beta: Number = 1, alpha: Number = 1) -> Any:
    """`beta * x + alpha * outer(a, b)`."""
    if x.dtype == jnp.bool_:
        return (x & bool(beta)) | (a[:, None] & b & bool(alpha))
    return _sum(x, a[:, None] * b, beta, alpha)


@op("outer", "ger")
def outer(a: Any, b: Any) -> Any:
    """The outer product."""
    return a[:, None] * b


@op("_trilinear")
def trilinear(
    a: Any, b: Any, c: Any, expand1: Any, expand2: Any, expand3: Any, sumdim: Any, unroll_dim: int = 1
) -> Any:
    """A product of three, summed over axes; what `nn.Bilinear` is made of."""
    expanded = []
    for x, axes in ((a, expand1), (b, expand2), (c, expand3)):
        for axis in axes:
            x = jnp.expand_dims(x, axis)
        expanded.append(x)
    a, b, c = expanded
    return jnp.sum(a * b * c, tuple(sumdim))


@op("linalg_cross")
def cross(a: Any, b: Any, *, dim: int = -1) -> Any:
    """The vector product."""
    a, b = jnp.broadcast_arrays(a, b)
    return jnp.cross(a, b, axis=dim)


@op("_cdist_forward")
def cdist(a: Any, b: Any, p: Number, mode: int | None = None) -> Any:
    """Distances of each to each; where one is zero, so is its derivative."""
    difference = a[..., :, None, :] - b[..., None, :, :]
    size = absolute(difference)
    if p == 2:
        return root(jnp.sum(difference * difference, -1))
    if p == 1:
        return jnp.sum(size, -1)
    if p == 0:
        return jnp.sum((difference != 0).astype(a.dtype), -1)
    if p == float("inf"):
        return jnp.max(size, -1, initial=0)
    zero = size == 0
    summed = jnp.sum(jnp.where(zero, 0, jnp.where(zero, 1, size) ** p), -1)
    none = summed == 0
    return jnp.where(none, 0, jnp.where(none, 1, summed) ** (1 / p))


@op("_euclidean_dist")
def euclidean_distance(a: Any, b: Any) -> Any:
    """Euclidean distances of each to each."""
    return cdist(a, b, 2)


@op("_pdist_forward")
def pdist(x: Any, p: Number = 2) -> Any:
    """Distances of each pair."""
    rows, columns = jnp.triu_indices(x.shape[0], 1)
    return cdist(x[rows][:, None], x[columns][:, None], p)[:, 0, 0]


# --- factorisations ------------------------------------------------------------------------------


def _fine(x: Any) -> Any:
    """`info` of LAPACK's: zero where nothing failed."""
    return jnp.zeros(x.shape[:-2], jnp.int32)


@op("linalg_cholesky_ex")
def cholesky_ex(x: Any, *, upper: bool = False, check_errors: bool = False) -> Any:
    """The Cholesky factor, of which only a triangle of the matrix is read."""
    x = jnp.conj(jnp.swapaxes(x, -1, -2)) if upper else x
    lower = lax.linalg.cholesky(jnp.tril(x) + jnp.conj(jnp.swapaxes(jnp.tril(x, -1), -1, -2)), symmetrize_input=False)
    return jnp.conj(jnp.swapaxes(lower, -1, -2)) if upper else lower, _fine(x)


@op("cholesky")
def cholesky(x: Any, upper: bool = False) -> Any:
    """The Cholesky factor."""
    return cholesky_ex(x, upper=upper)[0]


@op("linalg_qr")
def qr(x: Any, mode: str = "reduced") -> Any:
    """Q and R; without Q for mode `r`."""
    if mode == "r":
        return jnp.zeros((0,), x.dtype), jnp.linalg.qr(x, "r")
    return tuple(jnp.linalg.qr(x, mode))


@op("_linalg_svd")
def svd(x: Any, full_matrices: bool = False, compute_uv: bool = True, *, driver: Any = None, out: Any) -> Any:
    """U, S and the adjoint of V; without them S alone."""
    if not compute_uv:
        return jnp.zeros(out[0].shape, x.dtype), jnp.linalg.svd(x, compute_uv=False), jnp.zeros(out[2].shape, x.dtype)
    return tuple(jnp.linalg.svd(x, full_matrices=full_matrices))


@op("_linalg_eigh")
def eigh(x: Any, uplo: str = "L", compute_v: bool = True, *, out: Any) -> Any:
    """Eigenvalues and eigenvectors of a symmetric matrix, of which one triangle is read."""
    values, vectors = jnp.linalg.eigh(x, UPLO=uplo)
    return values, vectors if compute_v else jnp.zeros(out[1].shape, x.dtype)


@op("_linalg_det")
def det(x: Any, *, out: Any) -> Any:
    """The determinant; the factors beside it are for torch's derivative."""
    lu, pivots, _ = lax.linalg.lu(lax.stop_gradient(x))
    return jnp.linalg.det(x), lu, pivots + 1


@op("_linalg_slogdet")
def slogdet(x: Any, *, out: Any) -> Any:
    """The sign and the logarithm of the determinant."""
    sign, size = jnp.linalg.slogdet(x)
    lu, pivots, _ = lax.linalg.lu(lax.stop_gradient(x))
    return sign, size, lu, pivots + 1


@op("linalg_inv_ex")
def inverse(x: Any, *, check_errors: bool = False) -> Any:
    """The inverse."""
    return jnp.linalg.inv(x), _fine(x)


@op("inverse")
def plain_inverse(x: Any) -> Any:
    """The inverse."""
    return jnp.linalg.inv(x)


@op("_linalg_solve_ex")
def solve(a: Any, b: Any, *, left: bool = True, check_errors: bool = False, out: Any) -> Any:
    """`a x = b`, or `x a = b`."""
    is_vector = b.ndim == a.ndim - 1 and b.shape == a.shape[:-1] and a.ndim != b.ndim
    rhs = b[..., None] if is_vector else b
    if left:
        lead = jnp.broadcast_shapes(a.shape[:-2], rhs.shape[:-2])
        found = jnp.linalg.solve(
            jnp.broadcast_to(a, (*lead, *a.shape[-2:])), jnp.broadcast_to(rhs, (*lead, *rhs.shape[-2:]))
        )
    else:
        found = jnp.swapaxes(solve(jnp.swapaxes(a, -1, -2), jnp.swapaxes(rhs, -1, -2), out=out)[0], -1, -2)
    found = found[..., 0] if is_vector else found
    if not left:
        return (found,)
    lu, pivots, _ = lax.linalg.lu(lax.stop_gradient(a))
    rest = (lu, pivots + 1, _fine(a))
    return found, *(jnp.broadcast_to(x, aval.shape) for x, aval in zip(rest, out[1:], strict=True))


@op("linalg_solve_triangular")
def solve_triangular(a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    """A triangular system."""
    lead = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = jnp.broadcast_to(a, (*lead, *a.shape[-2:])), jnp.broadcast_to(b, (*lead, *b.shape[-2:]))
    return lax.linalg.triangular_solve(a, b, left_side=left, lower=not upper, unit_diagonal=unitriangular)


@op("triangular_solve")
def old_triangular_solve(
    b: Any, a: Any, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    """A triangular system, and its matrix."""
    given = jnp.swapaxes(a, -1, -2) if transpose else a
    return solve_triangular(given, b, upper=upper != transpose, unitriangular=unitriangular), a


@op("cholesky_solve")
def cholesky_solve(b: Any, factor: Any, upper: bool = False) -> Any:
    """A system by the Cholesky factor of its matrix."""
    adjoint = jnp.conj(jnp.swapaxes(factor, -1, -2))
    lower, higher = (adjoint, factor) if upper else (factor, adjoint)
    half = solve_triangular(lower, b, upper=False)
    return solve_triangular(higher, half, upper=True)


@op("cholesky_inverse")
def cholesky_inverse(factor: Any, upper: bool = False) -> Any:
    """The inverse of a matrix by its Cholesky factor."""
    return cholesky_solve(jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape), factor, upper)


@op("linalg_lu_factor_ex")
def lu_factor(x: Any, *, pivot: bool = True, check_errors: bool = False) -> Any:
    """The LU factors in one matrix, and the pivots, counted from one."""
    lu, pivots, _ = lax.linalg.lu(x)
    return lu, pivots + 1, _fine(x)


@op("linalg_matrix_exp")
def matrix_exp(x: Any) -> Any:
    """The exponential of a matrix."""
    wide = x.astype(opmath(x.dtype))
    return jnp.vectorize(jax.scipy.linalg.expm, signature="(n,n)->(n,n)")(wide) if x.size else x


@op("linalg_householder_product")
def householder_product(x: Any, tau: Any) -> Any:
    """The product of Householder reflections: the first columns of it."""
    n = x.shape[-1]
    columns = jnp.tril(x, -1) + jnp.eye(*x.shape[-2:], dtype=x.dtype)
    result = jnp.broadcast_to(jnp.eye(*x.shape[-2:], dtype=x.dtype), x.shape)
    for i in reversed(range(tau.shape[-1])):
        v = columns[..., :, i : i + 1]
        result = result - tau[..., i, None, None] * v * (jnp.conj(jnp.swapaxes(v, -1, -2)) @ result)
    return result[..., :n]


@op("trace")
def trace(x: Any) -> Any:
    """The sum of the diagonal."""
    return jnp.trace(x)


@op("kron")
def kron(a: Any, b: Any) -> Any:
    """The Kronecker product."""
    return jnp.kron(a, b)
