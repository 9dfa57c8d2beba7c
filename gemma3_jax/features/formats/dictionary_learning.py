"""dictionary_learning: `config.json` and `ae.pt`, the state dict of one of its classes.

All classes but JumpReLU subtract the decoder's bias from the input. BatchTopK and Matryoshka use their threshold, and
TopK the k largest features of each token. The decoder of an `AutoEncoder` gets unit rows, as when its library loads it.

Axes: i features of the input and output, f features of the dictionary.
"""

import re
from typing import TypedDict

import jax
import numpy as np

from gemma3_jax.features.activations import Gated, JumpRelu, Relu, TopK
from gemma3_jax.features.dictionaries import SparseAutoencoder
from gemma3_jax.features.formats.folder import Folder
from gemma3_jax.features.formats.tensors import Arguments, Tensors, of_k
from gemma3_jax.features.hookpoints import canonical, refuse, site_of
from gemma3_jax.features.torch_file import read_torch_file
from gemma3_jax.reading import CheckpointError
from gemma3_jax.sites.names import block
from gemma3_jax.types import Settings

CONFIG, WEIGHTS = "config.json", "ae.pt"
FILES = (CONFIG, WEIGHTS)

# By the words of submodule_name, which its users choose: the sites of a block that they may mean.
_SUBMODULES = {
    "resid_pre": ("hook_in",),
    "resid_post": ("hook_out",),
    "attn": ("attn.hook_out", "ln1_post.hook_out"),
    "mlp": ("mlp.hook_out", "ln2_post.hook_out"),
}


def is_here(folder: Folder) -> bool:
    """Whether a folder has files of this format."""
    return folder.has(WEIGHTS)


def model_name(folder: Folder) -> object:
    """The name of the model, as the config has it; None if it has none."""
    return _trainer(folder).get("lm_name")


def read(folder: Folder) -> SparseAutoencoder:
    """The dictionary.

    Raises:
        CheckpointError: a file is missing, damaged or not as the format says; its pickle has anything but tensors; the
            class is unknown; or the site is not known.
    """
    file = folder.path / WEIGHTS
    tensors = Tensors(file, read_torch_file(file))
    settings = _trainer(folder)
    name = settings.get("dict_class") or _class_of(tensors)
    if name not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise CheckpointError(f"{folder.path / CONFIG}: dict_class is {name!r}; the classes that are known are {known}")
    return SparseAutoencoder(**_CLASSES[name](tensors, settings), site_in=_site(folder, settings))


def _trainer(folder: Folder) -> Settings:
    """The settings of the trainer; {} if there are none."""
    settings = folder.config(CONFIG).get("trainer")
    return settings if isinstance(settings, dict) else {}


def _class_of(tensors: Tensors) -> str | None:
    """The class of a state dict without config, which its keys tell but for TopK and BatchTopK."""
    keys = {"bias": "AutoEncoder", "decoder.bias": "AutoEncoderNew", "gate_bias": "GatedAutoEncoder"}
    keys |= {"group_sizes": "MatryoshkaBatchTopKSAE", "W_enc": "JumpReluAutoEncoder"}
    return next((name for key, name in keys.items() if key in tensors), None)


class _Linear(TypedDict):
    """The part of `Arguments` that `_linear` finds."""

    W_enc: jax.Array
    W_dec: jax.Array
    b_dec: jax.Array
    subtracts_b_dec: bool


def _linear(tensors: Tensors, bias: str) -> _Linear:
    """The weights of a class with `nn.Linear` layers, whose decoder's bias is at the key `bias`."""
    encoder, decoder = tensors.take("encoder.weight", "f i"), tensors.take("decoder.weight", "i f")
    return {"W_enc": encoder.T, "W_dec": decoder.T, "b_dec": tensors.take(bias, "i"), "subtracts_b_dec": True}


def _named(tensors: Tensors, threshold: str) -> Arguments:
    """The arguments of a class with W_enc and W_dec, whose threshold has these axes."""
    return {
        "W_enc": tensors.take("W_enc", "i f"),
        "b_enc": tensors.take("b_enc", "f"),
        "W_dec": tensors.take("W_dec", "f i"),
        "b_dec": tensors.take("b_dec", "i"),
        "activation": JumpRelu(tensors.take("threshold", threshold)),
    }


def _auto_encoder(tensors: Tensors, settings: Settings) -> Arguments:
    weights: Arguments = {**_linear(tensors, "bias"), "b_enc": tensors.take("encoder.bias", "f"), "activation": Relu()}
    norms = np.linalg.norm(np.asarray(weights["W_dec"], np.float32), axis=1)
    if np.allclose(norms, 1):
        return weights
    W_enc, b_enc = weights["W_enc"] * norms, weights["b_enc"] * norms
    return {**weights, "W_enc": W_enc, "b_enc": b_enc, "W_dec": weights["W_dec"] / norms[:, None]}


def _auto_encoder_new(tensors: Tensors, settings: Settings) -> Arguments:
    weights = _linear(tensors, "decoder.bias")
    return {**weights, "b_enc": tensors.take("encoder.bias", "f"), "activation": Relu(), "subtracts_b_dec": False}


def _gated(tensors: Tensors, settings: Settings) -> Arguments:
    weights = _linear(tensors, "decoder_bias")
    activation = Gated(*(tensors.take(key, "f") for key in ("r_mag", "gate_bias", "mag_bias")))
    return {**weights, "b_enc": tensors.zeros("f"), "activation": activation}


def _jump_relu(tensors: Tensors, settings: Settings) -> Arguments:
    return _named(tensors, "f")


def _top_k(tensors: Tensors, settings: Settings) -> Arguments:
    weights, b_enc = _linear(tensors, "b_dec"), tensors.take("encoder.bias", "f")
    k = int(tensors.arrays["k"]) if "k" in tensors else settings.get("k")
    return {**weights, "b_enc": b_enc, "activation": TopK(of_k(k, tensors.sizes["f"], tensors.file))}


def _batch_top_k(tensors: Tensors, settings: Settings) -> Arguments:
    weights, b_enc = _linear(tensors, "b_dec"), tensors.take("encoder.bias", "f")
    return {**weights, "b_enc": b_enc, "activation": JumpRelu(tensors.take("threshold", ""))}


def _matryoshka(tensors: Tensors, settings: Settings) -> Arguments:
    return {**_named(tensors, ""), "subtracts_b_dec": True}


_CLASSES = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jump_relu,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}


def _site(folder: Folder, settings: Settings) -> str:
    """The site, by the words of a submodule's name, or by its name as a module of Hugging Face."""
    if folder.site_in is not None:
        return canonical(str(folder.site_in), "site_in", "site_in")
    name, where = settings.get("submodule_name"), f"{folder.path / CONFIG}: submodule_name"
    words = re.fullmatch(r"(resid_pre|resid_post|attn|mlp)(?:_out)?_layer_?(\d+)", str(name))
    if words is None:
        return site_of(name, where, "site_in")
    candidates = [block(words[2], part) for part in _SUBMODULES[words[1]]]
    return candidates[0] if len(candidates) == 1 else refuse(name, candidates, where, "site_in")
