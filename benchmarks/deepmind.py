"""DeepMind's own JAX model, `gemma`, with the port's parameters in its names and shapes.

Axes: d hidden_size, f intermediate_size.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax import Gemma3Config


def forward_peer(config: Gemma3Config, params: Any, tokens: jax.Array, dtype: str, last: bool) -> Callable[[], Any]:
    """The compiled forward pass of `gemma`, with logits at every position or only at the last."""
    model = _model(config, dtype)
    theirs = jax.tree.map(functools.partial(jnp.asarray, dtype=dtype), parameters(config, params))
    return lambda: model.apply({"params": theirs}, tokens, return_last_only=last).logits


def parameters(config: Gemma3Config, params: Any) -> dict[str, Any]:
    """The port's parameters in the peer's form: norms without the 1 that conversion added, gate and up in one array."""

    def norm(weight: Any) -> dict[str, Any]:
        return {"scale": np.asarray(weight) - 1}

    def block(ours: Any) -> dict[str, Any]:
        attn, mlp = ours["attn"], ours["mlp"]
        return {
            "attn": {
                "q_einsum": {"w": attn["q"]["weight"]},
                "kv_einsum": {"w": np.stack([attn["k"]["weight"], attn["v"]["weight"]])},
                "attn_vec_einsum": {"w": attn["o"]["weight"]},
                "_query_norm": norm(attn["q_norm"]["weight"]),
                "_key_norm": norm(attn["k_norm"]["weight"]),
            },
            "mlp": {
                # [d, f] and [d, f] -> [2, f, d]
                "gating_einsum": np.stack([np.asarray(mlp[name]["weight"]).T for name in ("gate", "in")]),
                "linear": mlp["out"]["weight"],
            },
            "pre_attention_norm": norm(ours["ln1"]["weight"]),
            "post_attention_norm": norm(ours["ln1_post"]["weight"]),
            "pre_ffw_norm": norm(ours["ln2"]["weight"]),
            "post_ffw_norm": norm(ours["ln2_post"]["weight"]),
        }

    blocks = {f"layer_{i}": block(params[f"blocks_{i}"]) for i in range(config.num_hidden_layers)}
    return {
        "embedder": {"input_embedding": params["embed"]["weight"]},
        "final_norm": norm(params["ln_final"]["weight"]),
        **blocks,
    }


def _model(config: Gemma3Config, dtype: str) -> Any:
    import kauldron.checkpoints

    # gemma 3.3 needs a class that kauldron 1.4 no longer has, and earlier versions of gemma do not run with jax 0.10.
    # The class is only a base class of checkpoint readers, which this benchmark does not use.
    if not hasattr(kauldron.checkpoints, "AbstractPartialLoader"):
        kauldron.checkpoints.AbstractPartialLoader = object
    from gemma.gm.nn import _config, _modules, _transformer

    kinds = {
        "sliding_attention": _modules.AttentionType.LOCAL_SLIDING,
        "full_attention": _modules.AttentionType.GLOBAL,
    }
    return _transformer.Transformer(
        dtype=jnp.dtype(dtype),
        config=_config.TransformerConfig(
            num_embed=config.vocab_size,
            embed_dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_key_value_heads,
            final_logit_softcap=config.final_logit_softcapping,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            use_qk_norm=True,
            attention_types=tuple(kinds[kind] for kind in config.layer_types),
            sliding_window_size=config.sliding_window,
            transpose_gating_einsum=True,
            local_base_frequency=config.rope_sliding.theta,
            global_base_frequency=config.rope_full.theta,
            global_scale_factor=config.rope_full.factor,
        ),
    )
