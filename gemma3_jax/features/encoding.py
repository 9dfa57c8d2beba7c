"""Features as a reduction: a capture has the features of a dictionary in place of the value of its site.

Axes: b batch, p position, k largest features, f features of the dictionary.
"""

import dataclasses

import flax.struct
import jax

from gemma3_jax.features.dictionaries import check_k
from gemma3_jax.features.layered import encode_layer
from gemma3_jax.features.parts import LAYERED
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.features.unchecked import warn_if_unchecked
from gemma3_jax.hooks.interception import Hook
from gemma3_jax.hooks.reductions import TopValues


@flax.struct.dataclass
class Encode:
    """The features of a dictionary, as a reduction of its site: `{sae.site_in: features.Encode(sae, k=64)}`.

    They are computed on the device, where the value of the site stays. Another dictionary of the same shape and at the
    same site does not compile anything. For a dictionary of several layers, the names of its sites may be one key.

    Attributes:
        dictionary: of any kind; its decoders are not kept.
        k: how many of the largest features of each token; None for all of them.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import TINY, HookedGemma3, features
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> d = model.config.hidden_size
    >>> sae = features.SparseAutoencoder(
    ...     W_enc=jnp.eye(d), b_enc=jnp.zeros(d), W_dec=jnp.eye(d), b_dec=jnp.zeros(d), activation=features.Relu(),
    ...     site_in="blocks.1.hook_out",
    ... )
    >>> _, cache = model.run_with_cache("ba ke lo", {sae.site_in: features.Encode(sae, k=5)})
    >>> cache[sae.site_in].values.shape, cache[sae.site_in].indices.shape
    ((1, 4, 5), (1, 4, 5))
    """

    dictionary: Dictionary
    k: int | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        warn_if_unchecked(self.dictionary)
        # Decoders would become inputs of the compiled program, and those of a CLT may be larger than memory.
        if isinstance(self.dictionary, LAYERED) and self.dictionary.W_dec:
            object.__setattr__(self, "dictionary", dataclasses.replace(self.dictionary, W_dec=()))

    def __call__(self, value: jax.Array, hook: Hook) -> TopValues | jax.Array:
        """`TopValues` [b, p, k], the largest first; or with k=None the features [b, p, f]. float32.

        Raises:
            ValueError: the dictionary does not read this site; or k is not between 1 and the width.
        """
        one = self.dictionary
        if hook.name not in ((one.site_in,) if isinstance(one.site_in, str) else one.site_in):
            raise ValueError(
                f"the dictionary reads {one.site_in}, not {hook.name}; load it with site_in= if that is its site"
            )
        if isinstance(one, LAYERED):
            if self.k is not None:
                check_k(self.k, one.width)
            found = encode_layer(one, one.site_in.index(hook.name), value, self.k)
        else:
            found = one.encode(value) if self.k is None else one.encode_topk(value, self.k)
        return TopValues(*found) if isinstance(found, tuple) else found
