"""The attention mask of each layer type.

Axes: b batch, p query position, k key position.
"""

from jaxtyping import Array, Bool, Integer, Shaped

from gemma3_jax.compute.masks import Mask
from gemma3_jax.config import Gemma3Config, LayerType


def mask_of(
    config: Gemma3Config,
    layer_type: LayerType,
    length: int,
    attention_mask: Shaped[Array, "b p"] | None = None,
    segment_ids: Integer[Array, "b p"] | None = None,
    present: Bool[Array, "1 p"] | None = None,
) -> Mask:
    """The mask of a layer of this type, for `length` columns.

    Distances are counted in columns, as in Hugging Face, so padding on either side does not change which real tokens
    are visible. Source: `transformers` `masking_utils`.

    Args:
        config: shape of the model.
        layer_type: "sliding_attention" or "full_attention".
        length: p, the number of columns.
        attention_mask: [b, p], 1 at real tokens; None if all tokens are real.
        segment_ids: [b, p], the document of each token, as `packed_documents` returns it; None if each row is one
            document.
        present: [1, p], false in columns that only fill the input up to a common length; None if there are none.
    """
    both_ways = config.use_bidirectional_attention
    before = length - 1
    if layer_type == "sliding_attention":
        before = min(before, config.sliding_window // 2 if both_ways else config.sliding_window - 1)
    real = None if attention_mask is None else attention_mask.astype(bool)
    return Mask(before, before if both_ways else 0, real, segment_ids, present)
