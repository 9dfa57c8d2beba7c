"""Small dictionaries in the published layout of Gemma Scope 2, and their mathematics in NumPy, in float64."""

import json

import numpy as np
from safetensors.numpy import save_file

D, F, LAYERS = 8, 40, 3


def params(seed=0, d_in=D, f=F, d_out=D, skip=False, targets=None):
    """The tensors of one file; some features have a negative threshold."""
    rng = np.random.default_rng(seed)
    shapes = {"w_enc": (d_in, f), "b_enc": (f,), "threshold": (f,), "b_dec": (d_out,)}
    shapes["w_dec"] = (f, d_out) if targets is None else (f, targets, d_out)
    if skip:
        shapes["affine_skip_connection"] = (d_in, d_out)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def write(folder, tensors, config=None, name="params.safetensors"):
    """Write one file, and config.json if there is a config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def write_layers(folder, layers=LAYERS, causal=True, skip=True, config=None):
    """Write a file for each layer; `causal` leaves out what they would write to earlier layers."""
    written = [params(seed, targets=layers, skip=skip) for seed in range(layers)]
    for layer, tensors in enumerate(written):
        if causal:
            tensors["w_dec"][:, :layer] = 0
        write(folder, tensors, config, f"params_layer_{layer}.safetensors")
    return written


def encoded(p, x):
    """The features of x."""
    z = x.astype(np.float64) @ p["w_enc"] + p["b_enc"]
    return np.maximum(z, 0) * (z > p["threshold"])


def output(p, x):
    """What a dictionary of one layer makes of x."""
    y = encoded(p, x) @ p["w_dec"] + p["b_dec"]
    return y + x @ p["affine_skip_connection"] if "affine_skip_connection" in p else y


def layered_output(layers, x, skip=True):
    """What a dictionary of several layers makes of x [l, ..., d]."""
    features = [encoded(p, value) for p, value in zip(layers, x, strict=True)]
    return np.stack(
        [
            target["b_dec"]
            + sum(f @ p["w_dec"][:, m] for f, p in zip(features, layers, strict=True))
            + (x[m] @ target["affine_skip_connection"] if skip else 0)
            for m, target in enumerate(layers)
        ]
    )
