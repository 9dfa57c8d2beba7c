"""`FactoredMatrix`: a product of two thin matrices that is never multiplied out.

The circuits of an attention head are [d, d] matrices of rank head_dim. At the 1b shape, one circuit is 5 MB in float32,
and each of its factors is a fifth of that. Norm, singular values and eigenvalues need only matrices of the inner size.

Axes: m and n are the sizes of the product, r is the inner size, and `...` are batch axes, such as layers and heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import TypeAlias, overload

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.compute.matmul import matmul
from gemma3_jax.descriptions import Described, Description, fields_of
from gemma3_jax.inputs import as_array
from gemma3_jax.types import ArrayLike

BatchIndex: TypeAlias = int | slice | EllipsisType | Sequence[int] | np.ndarray | jax.Array


@flax.struct.dataclass
class FactoredMatrix(Described):
    """The matrix A @ B [..., m, n], stored as a pytree of A [..., m, r] and B [..., r, n].

    Batch axes of A and B broadcast. `@` with a matrix, a batch of matrices or another FactoredMatrix, on either side,
    gives a FactoredMatrix. `@` with a vector [n] (or [m] on the left) gives a vector. `*` scales it by a number, or by
    one number for each batch entry. Products have the factors' dtype; decompositions are float32.
    Memory: each access computes its result again. The docstrings give the memory for one batch entry.

    Attributes:
        A: [..., m, r] array.
        B: [..., r, n] array.

    Raises:
        ValueError: A and B do not have the same inner size.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax.analysis import FactoredMatrix
    >>> product = FactoredMatrix(jnp.ones((2, 50, 3)), jnp.ones((3, 40)))
    >>> product.shape, product[0].norm().round(2), (product @ jnp.ones(40)).shape
    ((2, 50, 40), Array(134.16, dtype=float32), (2, 50))
    """

    A: jax.Array
    B: jax.Array

    __array_ufunc__ = None  # a NumPy array on the left of `@` or `*` leaves the operation to this class

    def __post_init__(self) -> None:
        object.__setattr__(self, "A", as_array(self.A))
        object.__setattr__(self, "B", as_array(self.B))
        shapes = [np.shape(factor) if hasattr(factor, "shape") else () for factor in (self.A, self.B)]
        # As a pytree it may hold other things for a while, such as the in_axes of vmap.
        if all(len(shape) > 1 for shape in shapes) and shapes[0][-1] != shapes[1][-2]:
            raise ValueError(f"A {shapes[0]} and B {shapes[1]} do not match: A's last axis must equal B's last but one")

    __repr__ = Described.__repr__  # dataclass would write one with every number

    def _description(self) -> Description:
        return Description("FactoredMatrix, the product A @ B", fields_of(self))

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., m, n), of the product."""
        return *self._batch, self.A.shape[-2], self.B.shape[-1]

    @property
    def ndim(self) -> int:
        """Number of axes of the product."""
        return len(self.shape)

    @property
    def mdim(self) -> int:
        """r, the inner size, which bounds the rank of the product."""
        return self.A.shape[-1]

    @property
    def AB(self) -> jax.Array:
        """[..., m, n], the product itself. The class exists to avoid the memory that this takes."""
        return _product(self.A, self.B)

    @property
    def BA(self) -> jax.Array:
        """[..., r, r], the product in the other order, which has the same nonzero eigenvalues; needs m = n."""
        self._need_square("BA")
        return _product(self.B, self.A)

    @property
    def T(self) -> FactoredMatrix:
        """[..., n, m], the transpose."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    def collapse_l(self) -> jax.Array:
        """[..., r, n] float32: the product without an orthogonal factor on its left.

        It has the same right singular vectors, singular values and norms of `self @ X`. (r is m where m < r.)
        """
        return _product(_triangle(self.A), _float32(self.B))

    def collapse_r(self) -> jax.Array:
        """[..., m, r] float32: the product without an orthogonal factor on its right; see `collapse_l`."""
        return self.T.collapse_l().mT

    def norm(self) -> jax.Array:
        """[...] float32, the Frobenius norm. Memory: the factors again, and [r, r]."""
        return jnp.linalg.norm(_product(_triangle(self.A), _triangle(self.B.mT).mT), axis=(-2, -1))

    def svd(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """U [..., m, r], S [..., r] in descending order and Vh [..., r, n], float32, where `U * S @ Vh` is the product.

        Computed from the QR of both factors and the SVD of an [r, r] matrix. (r is the least of m, n and r.)
        Memory: twice the factors.
        """
        left, left_triangle = jnp.linalg.qr(_float32(self.A))
        right, right_triangle = jnp.linalg.qr(_float32(self.B).mT)
        # [..., r, r]
        U, S, Vh = jnp.linalg.svd(_product(left_triangle, right_triangle.mT), full_matrices=False)
        return _product(left, U), S, _product(Vh, right.mT)

    @property
    def U(self) -> jax.Array:
        """[..., m, r], left singular vectors in columns."""
        return self.svd()[0]

    @property
    def S(self) -> jax.Array:
        """[..., r], singular values, descending. The other singular values of the product are 0."""
        return self.svd()[1]

    @property
    def Vh(self) -> jax.Array:
        """[..., r, n], right singular vectors in rows. (TransformerLens' `Vh` is the transpose.)"""
        return self.svd()[2]

    @property
    def eigenvalues(self) -> jax.Array:
        """[..., r] complex64, unordered; the other eigenvalues of the product are 0. Needs m = n. (r is m where m < r.)

        These are the eigenvalues of the [r, r] matrix BA. XLA on a TPU cannot compute nonsymmetric eigenvalues: there
        NumPy computes them on the host, without a derivative.
        """
        self._need_square("eigenvalues")
        small = self.BA if self.mdim <= self.A.shape[-2] else self.AB
        return jax.lax.platform_dependent(_float32(small), tpu=_eigenvalues_on_host, default=jnp.linalg.eigvals)

    def trace(self) -> jax.Array:
        """[...] float32, the sum of the diagonal; needs m = n."""
        self._need_square("trace")
        # [..., m, r] * [..., m, r] -> [...]
        return jnp.sum(_float32(self.A) * _float32(self.B).mT, axis=(-2, -1))

    def __getitem__(self, index: BatchIndex | tuple[BatchIndex, ...]) -> FactoredMatrix:
        """The FactoredMatrix of some batch entries: `circuit[layer, head]`. For rows or columns, index `AB`.

        A traced index outside the batch gives NaN.

        Raises:
            IndexError: the entry or the batch axis does not exist.
        """
        index = tuple(map(as_array, index if isinstance(index, tuple) else (index,)))
        if not any(isinstance(each, jax.core.Tracer) for each in index):
            # jax would clamp an index that is too large
            np.broadcast_to(0, self._batch)[index]
        inner = () if any(each is Ellipsis for each in index) else (Ellipsis,)
        where = (*index, *inner, slice(None), slice(None))

        def entries(factor: jax.Array) -> jax.Array:
            whole = jnp.broadcast_to(factor, (*self._batch, *factor.shape[-2:]))
            return whole.at[where].get(mode="fill", fill_value=jnp.nan)

        return FactoredMatrix(entries(self.A), entries(self.B))

    @overload
    def __matmul__(self, other: FactoredMatrix) -> FactoredMatrix: ...
    @overload
    def __matmul__(self, other: ArrayLike) -> FactoredMatrix | jax.Array: ...
    def __matmul__(self, other: FactoredMatrix | ArrayLike) -> FactoredMatrix | jax.Array:
        if isinstance(other, FactoredMatrix):
            # [..., r, n] x [..., n, s] -> [..., r, s]
            middle = _product(self.B, other.A)
            if self.mdim <= other.mdim:
                return FactoredMatrix(self.A, _product(middle, other.B))
            return FactoredMatrix(_product(self.A, middle), other.B)
        other = jnp.asarray(as_array(other))
        if other.ndim == 1:
            return _product(self.A, _product(self.B, other[:, None]))[..., 0]
        return FactoredMatrix(self.A, _product(self.B, other))

    def __rmatmul__(self, other: ArrayLike) -> FactoredMatrix | jax.Array:
        other = as_array(other)
        return (self.T @ jnp.asarray(other).mT).T if np.ndim(other) > 1 else self.T @ other

    def __mul__(self, scale: ArrayLike) -> FactoredMatrix:
        # [...] -> [..., 1, 1]
        return FactoredMatrix(self.A * jnp.asarray(as_array(scale))[..., None, None], self.B)

    __rmul__ = __mul__

    @property
    def _batch(self) -> tuple[int, ...]:
        return np.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2])

    def _need_square(self, what: str) -> None:
        if self.shape[-2] != self.shape[-1]:
            raise ValueError(f"{what} needs a square matrix; this one is {self.shape[-2]} x {self.shape[-1]}")


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    # [..., m, r] x [..., r, n] -> [..., m, n]
    if x.shape[-1] != y.shape[-2]:  # einsum would broadcast an axis of size 1
        raise ValueError(f"shapes {x.shape} and {y.shape} do not match: {x.shape[-1]} and {y.shape[-2]} must be equal")
    dtype = jnp.result_type(x, y)
    return matmul("...mr,...rn->...mn", x.astype(dtype), y.astype(dtype))


def _triangle(x: jax.Array) -> jax.Array:
    """[..., min(m, r), r]: R of x = Q R."""
    return jnp.linalg.qr(_float32(x), mode="r")


def _eigenvalues_on_host(x: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct(x.shape[:-1], jnp.complex64)
    return jax.pure_callback(lambda x: np.linalg.eigvals(x).astype(np.complex64), shape, x, vmap_method="broadcast_all")
