"""What the tests of parity share: a model's conversion, its truth in float64, and mistakes that must be seen."""

import jax

from conversion import convert_state_dict
from gemma3_jax import Gemma3Config
from gemma3_jax.parity import huggingface
from tests.helpers.random_models import random_tokens

LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}
# Four windows and more.
TOKENS = random_tokens((2, 30))


def converted(model):
    config = Gemma3Config.from_hf(model.config)
    return config, convert_state_dict(model.state_dict(), config)


def failures(rows):
    return [row for row in rows if not row.passed]


def truth_of(model, tokens, mask=None):
    return huggingface.activations(model, tokens, mask, exact=True)


WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "query_pre_attn_scalar": 32}


def shift_layers(params):
    """Layer i gets the weights of layer i + 1."""
    n = sum(key.startswith("blocks_") for key in params)
    return {**params, **{f"blocks_{i}": params[f"blocks_{(i + 1) % n}"] for i in range(n)}}


def drop_one(path):
    """The norm at `path` without its + 1."""

    def change(params):
        def edit(where, leaf):
            name = "/".join(key.key for key in where)
            return leaf - 1 if name.endswith(path) else leaf

        return jax.tree_util.tree_map_with_path(edit, params)

    return change
