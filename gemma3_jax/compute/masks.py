"""Attention masks.

Axes: b batch, p query position, k key position.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@flax.struct.dataclass
class Mask:
    """A query attends to the real keys of its document, from `before` columns before it to `after` columns after it.

    Attributes:
        before: number of columns (static).
        after: number of columns (static).
        real: [b, k] bool, whether a key is a real token; None if all are.
        segment_ids: [b, k] int32, the document of each key, numbered from 0 in each row; None if each row is one
            document.
        present: [1, k] bool, whether a key is in a column of the input; false in columns that only fill the input up
            to a common length. None if all are. A query that attends to no key takes the mean over these columns.
    """

    before: int = flax.struct.field(pytree_node=False)
    after: int = flax.struct.field(pytree_node=False)
    real: Bool[Array, "b k"] | None = None
    segment_ids: Int[Array, "b k"] | None = None
    present: Bool[Array, "1 k"] | None = None

    def seen(self, queries: Int[Array, " p"], keys: Int[Array, " k"]) -> Bool[Array, "_ p k"]:
        """[1 or b, p, k] bool for queries in columns [p] and keys in columns 0 to k - 1 of the mask's arrays.

        >>> columns = jnp.arange(3)
        >>> Mask(before=1, after=0).seen(columns, columns).astype(int)[0].tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
        >>> Mask(before=1, after=0, segment_ids=jnp.array([[0, 1, 1]])).seen(columns, columns).astype(int)[0].tolist()
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
        """
        # [p, k]
        distance = queries[:, None] - keys
        near = (distance <= self.before) & (distance >= -self.after)
        if self.segment_ids is not None:
            # [b, p, 1] == [b, 1, k]; queries that pad a block do not have a column
            of_queries = jnp.take(self.segment_ids, queries, axis=1, mode="clip")
            near = near & (of_queries[:, :, None] == self.segment_ids[:, None])
        if self.real is not None:
            near = near & self.real[:, None]
        return near if near.ndim == 3 else near[None]


@flax.struct.dataclass
class MaskChoice:
    """One of several masks for the same keys, chosen at run time: one program runs layers of several types.

    Attributes:
        which: [] int32, index of the chosen mask.
        masks: all masks.
    """

    which: Int[Array, ""]
    masks: tuple[Mask, ...]

    @property
    def present(self) -> Bool[Array, "1 k"] | None:
        """As `Mask.present`; the same in all masks."""
        return self.masks[0].present

    def seen(self, queries: Int[Array, " p"], keys: Int[Array, " k"]) -> Bool[Array, "_ p k"]:
        """As `Mask.seen`."""
        return jax.lax.select_n(self.which, *(mask.seen(queries, keys) for mask in self.masks))
