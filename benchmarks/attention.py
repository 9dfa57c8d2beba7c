"""Attention of one layer by length: local layers take O(tokens x window) time; no kernel takes O(tokens^2) memory.

One row of random q, k and v at the 270m and 1b shapes: 4 query heads, 1 key/value head, head_dim 256, window 512.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks.rows import Figure, Row, Settings
from benchmarks.timing import interleaved
from gemma3_jax import Gemma3Config
from gemma3_jax.compute.attention import attend, dense
from gemma3_jax.compute.masks import Mask
from gemma3_jax.config import LayerType
from gemma3_jax.model.masks import mask_of

KINDS: tuple[LayerType, ...] = ("sliding_attention", "full_attention")


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each kind of layer and length, in float32; up to 4096 tokens also with all scores at once."""
    config = Gemma3Config.preset("270m")
    for kind in KINDS:
        before: tuple[int, float] | None = None
        for tokens in (64, 128) if settings.quick else (1024, 2048, 4096, 8192):
            row = _row(config, kind, tokens, settings.rounds)
            if before is not None and kind == "sliding_attention":
                growth = row.seconds["port"] / before[1] / (tokens / before[0])
                row = Row(row.case, row.dtype, row.seconds, (*row.figures, Figure("growth / linear growth", growth)))
            before = tokens, row.seconds["port"]
            yield row


def random_qkv(config: Gemma3Config, shape: tuple[int, int], dtype: str) -> list[jax.Array]:
    """Queries, keys and values for a shape (b, p), each [b, p, n, e] with its own number of heads."""
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (*shape, n, config.head_dim), dtype) for key, n in zip(keys, heads, strict=True)]


def _row(config: Gemma3Config, kind: LayerType, tokens: int, rounds: int) -> Row:
    scale = config.query_pre_attn_scalar**-0.5
    qkv = random_qkv(config, (1, tokens), "float32")
    mask = mask_of(config, kind, tokens, None)

    def all_at_once(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: Mask) -> jax.Array:
        columns = jnp.arange(q.shape[1])
        return dense(q, k, v, scale, mask.seen(columns, columns))

    kernels = {"port": attend} | ({"all scores at once": all_at_once} if tokens <= 4096 else {})
    programs = {
        name: jax.jit(lambda *qkv, kernel=kernel: kernel(*qkv, scale, mask)).lower(*qkv).compile()
        for name, kernel in kernels.items()
    }
    seconds = interleaved({name: functools.partial(run, *qkv) for name, run in programs.items()}, rounds)
    megabytes = programs["port"].memory_analysis().temp_size_in_bytes / 1e6
    return Row(f"{kind}, {tokens} tokens", "float32", seconds, (Figure("MB between", megabytes),))
