"""What a feature writes to the logits on the direct path, past all later layers.

Axes: d hidden_size or features of a site, f features of the dictionary, m layers that are written, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.compute.matmul import matmul
from gemma3_jax.features.layered import Crosscoder
from gemma3_jax.features.parts import LAYERED, Feature
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.model.layout import layer_params
from gemma3_jax.sites.names import layer_of

# Where a value is the residual stream, or is added to it as it is; the names in a block come after it.
_STREAM = {"embed.hook_out", "ln_final.hook_in"} | {
    f"blocks.{name}"
    for name in (
        "hook_in",
        "hook_resid_mid",
        "hook_out",
        "ln1.hook_in",
        "ln2.hook_in",
        "ln1_post.hook_out",
        "ln2_post.hook_out",
    )
}
# Before a post-norm, which is by site, and before the projection in front of it.
_NORMS = {
    f"blocks.{name}": norm
    for norm, part, project in (("ln1_post", "attn", "o"), ("ln2_post", "mlp", "out"))
    for name in (
        f"{part}.{project}.hook_in",
        f"{part}.{project}.hook_out",
        f"{part}.hook_out",
        f"{norm}.hook_in",
        f"{norm}.hook_normalized",
    )
}
_PROJECTIONS = {"blocks.attn.o.hook_in": ("attn", "o"), "blocks.mlp.out.hook_in": ("mlp", "out")}


def direct_logits(model: HookedGemma3, sae: Dictionary, feature: Feature) -> np.ndarray:
    """What a feature of value 1 adds to each logit: [V] float32, without the mean over the vocabulary.

    The decoder row goes to the residual stream (through the output projection and the gain of the post-norm, if the
    site is before them), and from there through the gain of the final norm and the unembedding. Every norm divides by
    the scale of its whole input, which depends on the token and is positive: it is taken as 1, so the order of the
    logits is right, and their size is that where the root mean square of the stream is 1. A softmax does not see the
    mean, which is subtracted. A final_logit_softcapping is left out. A CLT's rows for all its layers are added up; of a
    crosscoder, the row for the last layer counts.

    Raises:
        ValueError: the dictionary writes to a site that has no direct path to the logits.
    """
    rows = _rows(sae, feature)
    # [d]
    row = sum(_to_stream(model, site, jnp.asarray(row, jnp.float32)) for site, row in rows)
    tied, params = model.config.tie_word_embeddings, model.params
    weight = params["embed"]["weight"] if tied else params["unembed"]["weight"]
    return np.asarray(_centred(row * params["ln_final"]["weight"].astype(jnp.float32), weight, tied))


@functools.partial(jax.jit, static_argnames="tied")
def _centred(row: jax.Array, weight: jax.Array, tied: bool) -> jax.Array:
    """Logits without their mean, [V], of [d] and of the embedding [V, d] or the unembedding [d, V]; without a copy."""
    logits = matmul("d,Vd->V" if tied else "d,dV->V", row, weight.astype(jnp.float32))
    return logits - jnp.mean(logits)


def _rows(sae: Dictionary, feature: Feature) -> list[tuple[str, jax.Array | np.ndarray]]:
    """The sites that a feature writes, and its decoder row [d] for each."""
    if not isinstance(sae, LAYERED):
        return [(sae.site_out, sae.W_dec[feature])]
    assert isinstance(feature, tuple)
    layers = [layer_of(name) for name in sae.site_in]
    # [m, d]
    rows = sae.W_dec[layers.index(feature[0])][feature[1]]
    written = list(zip(sae.site_out[-len(rows) :], rows, strict=True))
    return written[-1:] if isinstance(sae, Crosscoder) else written


def _to_stream(model: HookedGemma3, site: str, row: jax.Array) -> jax.Array:
    """A vector [d] at a site as it enters the residual stream."""
    layer = layer_of(site)
    name = site if layer is None else site.replace(f".{layer}.", ".", 1)
    if name in _STREAM:
        return row
    if name not in _NORMS:
        raise ValueError(f"{site} has no direct path to the logits: its value is not added to the residual stream")
    assert layer is not None
    if name in _PROJECTIONS:
        weight = layer_params(model.config, model.params, layer, *_PROJECTIONS[name], "weight").astype(jnp.float32)
        # [d of the site] x [d of the site, d] -> [d]
        row = matmul("s,sd->d", row, weight.reshape(-1, weight.shape[-1]))
    return row * layer_params(model.config, model.params, layer, _NORMS[name], "weight").astype(jnp.float32)
