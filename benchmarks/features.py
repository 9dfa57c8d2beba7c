"""Encoding by a wide JumpReLU autoencoder, beside SAELens: all features, and the 64 largest.

Weights are random, with about a hundred active features of each token at a width of 16k.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.peers import installed
from benchmarks.rows import Row, Settings, ratio
from benchmarks.timing import interleaved
from gemma3_jax import features

K, GOAL = 64, 1.5
# (width, tokens)
CASES = ((16_384, 512), (262_144, 64))
QUICK = ((512, 16),)
PEER = "SAELens" if installed("sae_lens") else "torch"


def rows(settings: Settings) -> Iterator[Row]:
    """Two rows for each width, in float32, which both sides compute in."""
    for width, tokens in QUICK if settings.quick else CASES:
        yield from _rows_of(settings, width, tokens)
        jax.clear_caches()


def _rows_of(settings: Settings, width: int, tokens: int) -> Iterator[Row]:
    d = settings.config.hidden_size
    sae, x = _autoencoder(d, width), np.random.default_rng(1).standard_normal((tokens, d), np.float32)
    of_port, of_torch, encode = jnp.asarray(x), torch.from_numpy(x), _torch_encoder(sae)
    runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "all features": (lambda: sae.encode(of_port), lambda: encode(of_torch)),
        f"{K} largest": (lambda: sae.encode_topk(of_port, K), lambda: encode(of_torch).topk(K)),
    }
    for what, (port, peer) in runs.items():
        peers = {"port": port, PEER: functools.partial(_without_gradients, peer)}
        seconds = interleaved(peers, settings.rounds)
        figure = ratio(seconds, None if settings.quick else GOAL)
        case = f"{what} of {width:,}, {tokens} tokens of {d}"
        yield Row(case, "float32", seconds, (figure,), flops=2.0 * tokens * d * width)


def _autoencoder(d: int, width: int) -> features.SparseAutoencoder:
    draw = np.random.default_rng(0)
    return features.SparseAutoencoder(
        W_enc=jax.device_put(draw.standard_normal((d, width), np.float32) / d**0.5),
        b_enc=jnp.full(width, -1.5),
        W_dec=jnp.zeros((width, 1)),
        b_dec=jnp.zeros(1),
        activation=features.JumpRelu(jnp.ones(width)),
        site_in="blocks.0.hook_out",
    )


def _torch_encoder(sae: features.SparseAutoencoder) -> Callable[[torch.Tensor], torch.Tensor]:
    """SAELens' encoder with the same weights; without SAELens, the same operations."""
    arrays = sae.W_enc, sae.b_enc, sae.activation.threshold
    W_enc, b_enc, threshold = (torch.from_numpy(np.array(array)) for array in arrays)
    if not installed("sae_lens"):

        def encode(x: torch.Tensor) -> torch.Tensor:
            z = x @ W_enc + b_enc
            return torch.relu(z) * (z > threshold).to(z.dtype)

        return encode
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class("jumprelu")
    peer = kind(config(d_in=1, d_sae=1, apply_b_dec_to_input=False))
    peer.W_enc.data, peer.b_enc.data, peer.threshold.data = W_enc, b_enc, threshold
    return peer.encode


def _without_gradients(run: Callable[[], Any]) -> float:
    """Run torch; one number of the result, so that nothing has to be copied."""
    with torch.inference_mode():
        found = run()
        return float((found[0] if isinstance(found, tuple) else found).flatten()[0])
