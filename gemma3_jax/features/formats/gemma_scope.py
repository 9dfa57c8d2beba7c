"""Gemma Scope 2: `config.json` with `params.safetensors`, or with one `params_layer_{i}.safetensors` for each layer.

Encoders have neither a bias before them nor a normalization of the input, and the activation is a JumpReLU.
`affine_skip_connection` is [d_in, d_out]: `x @ skip`. The decoders of a CLT have all target layers by their absolute
index; those before the layer that is read are not used.

Axes: i features of the input, o of the output, f features of the dictionary, l layers.
"""

import re
import warnings
from pathlib import Path

import jax
import numpy as np

from gemma3_jax.features.activations import JumpRelu
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.formats.folder import Folder, SiteNames
from gemma3_jax.features.formats.tensors import Arguments, Tensors, of_safetensors
from gemma3_jax.features.hookpoints import canonical, expanded, site_of
from gemma3_jax.features.layered import Crosscoder, CrossLayerTranscoder
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.reading import CheckpointError
from gemma3_jax.sites.names import block
from gemma3_jax.types import Settings

CONFIG, PARAMS, LAYER_PARAMS = "config.json", "params.safetensors", "params_layer_{}.safetensors"
FILES = (CONFIG, PARAMS, LAYER_PARAMS.replace("{}", "*"))
SKIP = "affine_skip_connection"

_MLP = ("ln2.hook_out", "ln2_post.hook_out")
# The sites that a folder's name stands for, within a block, where config.json is missing.
_SITES = {
    "resid_post": ("hook_out", "hook_out"),
    "attn_out": ("attn.o.hook_in", "attn.o.hook_in"),
    "mlp_out": ("ln2_post.hook_out", "ln2_post.hook_out"),
    "transcoder": _MLP,
    "clt": _MLP,
    "crosscoder": ("hook_out", "hook_out"),
}


def is_here(folder: Folder) -> bool:
    """Whether a folder has files of this format."""
    return folder.has(PARAMS) or bool(folder.numbered(LAYER_PARAMS))


def model_name(folder: Folder) -> object:
    """The name of the model, as the config has it; None if it has none."""
    return folder.config(CONFIG).get("model_name")


def read(folder: Folder) -> Dictionary:
    """The dictionary with mapped arrays.

    Raises:
        CheckpointError: a file is missing, damaged or not as the format says; or the sites are not known.
    """
    config, files = folder.config(CONFIG), folder.numbered(LAYER_PARAMS)
    if files:
        return _read_layers(folder, config, files)
    tensors = of_safetensors(folder.path / PARAMS)
    site_in, site_out = (_site(folder, config, argument) for argument in ("site_in", "site_out"))
    W_enc, b_enc, activation = _encoder(tensors)
    arguments: Arguments = {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "activation": activation,
        "W_dec": tensors.take("w_dec", "f o"),
        "b_dec": tensors.take("b_dec", "o"),
    }
    if site_in == site_out and SKIP not in tensors:
        return SparseAutoencoder(**arguments, site_in=site_in)
    skip = tensors.take(SKIP, "i o") if SKIP in tensors else None
    return Transcoder(**arguments, site_in=site_in, site_out=site_out, skip=skip)


def _encoder(tensors: Tensors) -> tuple[jax.Array, jax.Array, JumpRelu]:
    return tensors.take("w_enc", "i f"), tensors.take("b_enc", "f"), JumpRelu(tensors.take("threshold", "f"))


def _read_layers(folder: Folder, config: Settings, files: list[Path]) -> CrossLayerTranscoder | Crosscoder:
    layers = [of_safetensors(file) for file in files]
    layers[0].sizes["l"] = len(files)
    for tensors in layers:
        tensors.sizes = layers[0].sizes  # so sizes are equal across files too
    W_enc, b_enc, activation = zip(*map(_encoder, layers), strict=True)
    decoders = [tensors.take("w_dec", "f l o") for tensors in layers]
    b_dec = tuple(tensors.take("b_dec", "o") for tensors in layers)
    site_in, site_out = (_sites(folder, config, argument, len(files)) for argument in ("site_in", "site_out"))
    if site_in == site_out:
        return Crosscoder(
            W_enc=W_enc, b_enc=b_enc, W_dec=tuple(decoders), b_dec=b_dec, activation=activation, site_in=site_in
        )
    _warn_of_earlier_targets(decoders, folder.path)
    skips = [tensors.take(SKIP, "i o") for tensors in layers if SKIP in tensors]
    if skips and len(skips) < len(layers):
        raise CheckpointError(f"{folder.path}: {SKIP} is in some layers, and not in all")
    causal = tuple(decoder[:, layer:] for layer, decoder in enumerate(decoders))
    return CrossLayerTranscoder(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=causal,
        b_dec=b_dec,
        activation=activation,
        site_in=site_in,
        site_out=site_out,
        skip=tuple(skips) or None,
    )


def _warn_of_earlier_targets(decoders: list[np.ndarray], path: Path) -> None:
    """Warn if some features of decoders [f, l, o] write to layers before their own: these parts are not used."""
    backwards = [
        layer
        for layer, w in enumerate(decoders)
        if w[:: max(len(w) // 8, 1), :layer].any()  # the files are large
    ]
    if backwards:
        warnings.warn(
            f"{path}: w_dec of the layers {backwards} has targets before them, which a cross-layer transcoder cannot "
            "write; they are left out",
            stacklevel=2,
        )


def _site(folder: Folder, config: Settings, argument: str) -> str:
    """The site of a dictionary of one layer: as the caller says, as the config says, or as the path says."""
    given = getattr(folder, argument)
    if given is not None:
        return canonical(given, argument, argument)
    found = _configured(config, argument)
    if found is not None:
        return site_of(found, f"{folder.path / CONFIG}: hf_hook_point", argument)
    layers, parts = _of_path(folder, argument)
    return block(layers[0], parts)


def _sites(folder: Folder, config: Settings, argument: str, layers: int) -> tuple[str, ...]:
    """The sites of a dictionary of several layers, as `_site`."""
    given = getattr(folder, argument)
    names: SiteNames
    if given is not None:
        where, names = argument, given
    elif (found := _configured(config, argument)) is not None:
        where, names = f"{folder.path / CONFIG}: hf_hook_point", found
    else:
        numbers, part = _of_path(folder, argument)
        where, names = str(folder.path), [block(layer, part) for layer in numbers or range(layers)]
    sites = tuple(site_of(name, where, argument) for name in expanded(names, range(layers)))
    if len(sites) != layers or len(set(sites)) < layers:
        raise CheckpointError(
            f"{where}: {names} are {len(set(sites))} sites, for {layers} layers; give {argument}= to load: a list, or "
            "a name with '*' for the layer"
        )
    return sites


def _configured(config: Settings, argument: str) -> SiteNames | None:
    """The name that a config has for a site. The output of an autoencoder is at its input."""
    name = config.get(argument.replace("site", "hf_hook_point"))
    if name is not None or argument == "site_in":
        return name
    point = config.get("hf_hook_point_in")
    reads_as_transcoder = str(point).endswith("pre_feedforward_layernorm.output")
    kind = config.get("type", "transcoder" if reads_as_transcoder else "sae")
    return point if kind in ("sae", "crosscoder") else None


def _of_path(folder: Folder, argument: str) -> tuple[list[int], str]:
    """The layers and the site within a block that the path of a folder stands for."""
    kinds = [part.removesuffix("_all") for part in folder.path.absolute().parts]
    kind = next((kind for kind in reversed(kinds) if kind in _SITES), None)
    layers = re.match(r"layer_(\d+(?:_\d+)*)_width", folder.path.name)
    if kind is None or (layers is None and kind != "clt"):
        raise CheckpointError(
            f"{folder.path} has no {CONFIG} that names its sites, and no name such as resid_post/layer_9_width_16k; "
            f"give {argument}= to load"
        )
    return [int(n) for n in layers[1].split("_")] if layers else [], _SITES[kind][argument == "site_out"]
