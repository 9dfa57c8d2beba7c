"""SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 and of those before it.

An input is normalized, `b_dec` is subtracted if `apply_b_dec_to_input` says so, and the output of an autoencoder is
scaled back. A BatchTopK autoencoder is saved as a JumpReLU one. `W_skip` is [d_out, d_in]: `x @ W_skip.T`.

Axes: i features of the input, o of the output, f features of the dictionary.
"""

import warnings
from pathlib import Path

import numpy as np

from gemma3_jax.features.activations import Activation, Gated, JumpRelu, Relu, TopK
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.formats.folder import Folder
from gemma3_jax.features.formats.tensors import Arguments, Tensors, of_k, of_safetensors
from gemma3_jax.features.hookpoints import given_or_named
from gemma3_jax.features.normalizations import LayerNorm, Normalization, UnitNorm
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Settings

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FILES = (CONFIG, WEIGHTS)

_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_AUTOENCODERS = ("standard", "topk", "jumprelu", "gated")
# Names of settings before version 6.
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
NORMALIZATIONS: dict[str, Normalization | None] = {
    "none": None,
    "expected_average_only_in": None,
    "constant_norm_rescale": UnitNorm(),
    "layer_norm": LayerNorm(),
}


def is_here(folder: Folder) -> bool:
    """Whether a folder has files of this format."""
    return folder.has(WEIGHTS)


def model_name(folder: Folder) -> object:
    """The name of the model, as the config has it; None if it has none."""
    return _settings(folder).get("model_name")


def neuronpedia_id(folder: Folder) -> object:
    """The id that the dictionary has on Neuronpedia, as the config has it; None if it has none."""
    return _settings(folder).get("neuronpedia_id") if is_here(folder) else None


def read(folder: Folder) -> SparseAutoencoder | Transcoder:
    """The dictionary with mapped arrays.

    Raises:
        CheckpointError: a file is missing, damaged or not as the format says; the architecture is unknown; or the
            sites are not known.
    """
    file = folder.path / CONFIG
    config, tensors = _settings(folder), of_safetensors(folder.path / WEIGHTS)
    architecture = config.get("architecture", "standard")
    if architecture not in (*_AUTOENCODERS, *_TRANSCODERS):
        known = ", ".join((*_AUTOENCODERS, *_TRANSCODERS))
        raise CheckpointError(f"{file}: the architecture {architecture!r} is not supported; known are {known}")
    if config.get("hook_head_index") is not None:
        raise CheckpointError(f"{file}: it reads one head alone (hook_head_index), which is not supported")
    is_transcoder = architecture in _TRANSCODERS
    arguments: Arguments = {
        "W_enc": tensors.take("W_enc", "i f"),
        "W_dec": tensors.take("W_dec", "f o"),
        "b_dec": tensors.take("b_dec", "o"),
        "b_enc": tensors.zeros("f") if architecture == "gated" else tensors.take("b_enc", "f"),
        "activation": _activation(config, tensors, file),
    }
    arguments = _rescaled(arguments, config, tensors, file)
    arguments["normalization"] = _normalization(config, file)
    site_in = _site(folder, config, "site_in")
    # Early versions wrote the default of an autoencoder for transcoders, too, which none ever followed.
    arguments["subtracts_b_dec"] = not is_transcoder and bool(config.get("apply_b_dec_to_input", True))
    if not is_transcoder:
        return SparseAutoencoder(**arguments, site_in=site_in)
    skip = tensors.take("W_skip", "o i").T if "skip" in architecture else None
    return Transcoder(**arguments, site_in=site_in, site_out=_site(folder, config, "site_out"), skip=skip)


def _settings(folder: Folder) -> Settings:
    """All settings on one level, under the names and with the defaults of version 6."""
    config = folder.config(CONFIG)
    metadata = config.get("metadata")
    if isinstance(metadata, dict):
        return {**metadata, **config}
    old = {_RENAMED.get(key, key): value for key, value in config.items()}
    if old.get("activation_fn") == "topk":
        arguments = old.get("activation_fn_kwargs") or {}
        old |= {"architecture": "topk", "k": arguments.get("k")}
    return {"apply_b_dec_to_input": True, **old}


def _site(folder: Folder, config: Settings, argument: str) -> str:
    """The site, by its Hugging Face name if the config has it, which has one meaning."""
    names = {"site_in": ("hf_hook_name", "hook_name"), "site_out": ("hf_hook_name_out", "hook_name_out")}[argument]
    key = next((key for key in names if config.get(key) is not None), names[-1])
    return given_or_named(getattr(folder, argument), config.get(key), f"{folder.path / CONFIG}: {key}", argument)


def _activation(config: Settings, tensors: Tensors, file: Path) -> Activation:
    architecture = config.get("architecture", "standard")
    if architecture == "gated":
        return Gated(*(tensors.take(key, "f") for key in ("r_mag", "b_gate", "b_mag")))
    if architecture.startswith("jumprelu"):
        return JumpRelu(tensors.take("threshold", "f"))
    if architecture == "topk":
        return TopK(of_k(config.get("k"), tensors.sizes["f"], file))
    function = config.get("activation_fn", "relu")
    if function != "relu":
        raise CheckpointError(f"{file}: the activation {function!r} is not supported; known are relu and topk")
    return Relu()


def _rescaled(arguments: Arguments, config: Settings, tensors: Tensors, file: Path) -> Arguments:
    """The weights, with scales of features folded in: decoder norms, and factors that were found by finetuning."""
    if config.get("rescale_acts_by_decoder_norm"):
        norm = np.linalg.norm(np.asarray(arguments["W_dec"], np.float32), axis=1)
        arguments = {
            **arguments,
            "W_enc": arguments["W_enc"] * norm,
            "b_enc": arguments["b_enc"] * norm,
            "W_dec": arguments["W_dec"] / norm[:, None],
        }
    factor = tensors.take("scaling_factor", "f") if "scaling_factor" in tensors else np.ones(1)
    if np.all(factor == 1):
        return arguments
    if not config.get("finetuning_scaling_factor"):
        raise CheckpointError(f"{file}: there is a scaling_factor, but finetuning_scaling_factor is not true")
    return {**arguments, "W_dec": arguments["W_dec"] * factor[:, None]}


def _normalization(config: Settings, file: Path) -> Normalization | None:
    name = config.get("normalize_activations") or "none"
    name = "expected_average_only_in" if name is True else name
    if name not in NORMALIZATIONS:
        known = ", ".join(NORMALIZATIONS)
        raise CheckpointError(f"{file}: normalize_activations is {name!r}; known are {known}, and folded weights")
    if name == "expected_average_only_in":
        warnings.warn(
            f"{file}: the input was scaled to an average norm in training, by a factor that the files do not have; it "
            "is not scaled here, as in SAELens. Multiply W_enc by the factor, and divide W_dec and b_dec by it",
            stacklevel=2,
        )
    return NORMALIZATIONS[name]
