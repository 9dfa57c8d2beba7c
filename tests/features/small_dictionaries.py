"""Random dictionaries for the small model, shared by tests."""

import jax.numpy as jnp
import numpy as np

from gemma3_jax import features
from tests.helpers.random_models import SMALL

D, F = SMALL["hidden_size"], 24
MLP_IN, MLP_OUT = "blocks.{}.ln2.hook_out", "blocks.{}.ln2_post.hook_out"


def arrays(seed=0, d=D, out=(), f=F):
    """Weights and biases; `out` is the shape of written axes after f."""
    r = np.random.default_rng(seed)
    shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, *(out or (d,))), "b_dec": ((out or (d,))[-1],)}
    return {name: jnp.asarray(0.3 * r.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def sae(site="blocks.1.hook_out", seed=0, d=D, **more):
    """An autoencoder."""
    return features.SparseAutoencoder(**{"activation": features.Relu(), **arrays(seed, d), "site_in": site} | more)


def transcoder(layer=1, seed=1, d=D, **more):
    """A transcoder of an MLP with its norms."""
    sites = {"site_in": MLP_IN.format(layer), "site_out": MLP_OUT.format(layer)}
    return features.Transcoder(**arrays(seed, d), **sites, activation=features.JumpRelu(jnp.asarray(0.05)), **more)


def clt(layers=2, seed=2, d=D):
    """A cross-layer transcoder with skip connections."""
    each = [arrays(seed + i, d, out=(layers - i, d)) for i in range(layers)]
    lists = {name: tuple(one[name] for one in each) for name in each[0]}
    return features.CrossLayerTranscoder(
        **lists,
        activation=(features.Relu(),) * layers,
        site_in=tuple(MLP_IN.format(i) for i in range(layers)),
        site_out=tuple(MLP_OUT.format(i) for i in range(layers)),
        skip=tuple(0.1 * jnp.eye(d) for _ in range(layers)),
    )


def crosscoder(layers=2, seed=3):
    """A crosscoder whose features write to all layers."""
    one = clt(layers, seed)
    return features.Crosscoder(
        W_enc=one.W_enc,
        b_enc=one.b_enc,
        W_dec=tuple(arrays(9 + i, out=(layers, D))["W_dec"] for i in range(layers)),
        b_dec=one.b_dec,
        activation=one.activation,
        site_in=tuple(f"blocks.{i}.hook_out" for i in range(layers)),
    )
