"""Dictionaries in the format of SAELens 6. See `saelens`, which reads it."""

from gemma3_jax.features.activations import Gated, Relu, TopK
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.formats.outgoing import Outgoing, Tensor, as_is, folded_bias, threshold_of, transposed
from gemma3_jax.features.formats.saelens import CONFIG, NORMALIZATIONS, WEIGHTS
from gemma3_jax.features.hookpoints import huggingface_name, transformer_lens_name
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.reading import CheckpointError
from gemma3_jax.sites.table import site
from gemma3_jax.types import JsonObject, Settings

_FORMAT, _VERSION = "saelens", "6.0.0"


def outgoing(dictionary: Dictionary, model_name: str | None) -> Outgoing:
    """The files of a dictionary.

    Raises:
        CheckpointError: the format cannot hold it.
    """
    if not isinstance(dictionary, SparseAutoencoder | Transcoder):
        raise CheckpointError(f"{_FORMAT} has no {type(dictionary).__name__}; use format='gemma_scope'")
    architecture, tensors, settings = _encoder(dictionary)
    is_transcoder = isinstance(dictionary, Transcoder)
    skip = dictionary.skip if isinstance(dictionary, Transcoder) else None
    if is_transcoder:
        jump = "jumprelu_" if architecture == "jumprelu" else ""
        architecture = f"{jump}{'' if skip is None else 'skip_'}transcoder"
    tensors |= {"W_enc": as_is(dictionary.W_enc), "W_dec": as_is(dictionary.W_dec), "b_dec": as_is(dictionary.b_dec)}
    if skip is not None:
        tensors["W_skip"] = transposed(skip)
    by_head = not is_transcoder and site(dictionary.site_in).axes.endswith("h e")
    config: JsonObject = {
        "architecture": architecture,
        "d_in": dictionary.W_enc.shape[0],
        "d_sae": dictionary.width,
        "dtype": dictionary.W_enc.dtype.name,
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.subtracts_b_dec and not is_transcoder,
        "normalize_activations": _normalization(dictionary),
        "reshape_activations": "hook_z" if by_head else "none",
        **({"d_out": dictionary.W_dec.shape[1]} if is_transcoder else {}),
        **settings,
        "metadata": _metadata(dictionary, model_name),
    }
    return Outgoing({WEIGHTS: tensors}, CONFIG, config)


def _encoder(dictionary: SparseAutoencoder | Transcoder) -> tuple[str, dict[str, Tensor], Settings]:
    """The architecture of an autoencoder with this encoder, the encoder's other tensors, and its settings."""
    is_transcoder, activation = isinstance(dictionary, Transcoder), dictionary.activation
    if isinstance(activation, Gated) and not is_transcoder:
        parts = {key: getattr(activation, key) for key in ("r_mag", "b_gate", "b_mag")}
        return "gated", {key: as_is(array) for key, array in parts.items()}, {}
    # A transcoder cannot subtract b_dec in this format
    bias = {"b_enc": folded_bias(dictionary) if is_transcoder else as_is(dictionary.b_enc)}
    if isinstance(activation, Relu):
        return "standard", bias, {}
    if isinstance(activation, TopK) and not is_transcoder:
        return "topk", bias, {"k": activation.k, "rescale_acts_by_decoder_norm": False}
    return "jumprelu", {**bias, "threshold": threshold_of(activation, dictionary.width, _FORMAT)}, {}


def _normalization(dictionary: SparseAutoencoder | Transcoder) -> str:
    names = [name for name, known in NORMALIZATIONS.items() if known == dictionary.normalization]
    if not names:
        raise CheckpointError(f"{_FORMAT} has no {dictionary.normalization}")
    return names[0]


def _metadata(dictionary: SparseAutoencoder | Transcoder, model_name: str | None) -> dict[str, str]:
    """The names of the sites and of the model."""
    named = {
        "hook_name": transformer_lens_name(dictionary.site_in),
        "hf_hook_name": huggingface_name(dictionary.site_in),
    }
    if isinstance(dictionary, Transcoder):
        named["hook_name_out"] = transformer_lens_name(dictionary.site_out)
        named["hf_hook_name_out"] = huggingface_name(dictionary.site_out)
    return {"sae_lens_version": _VERSION, **({} if model_name is None else {"model_name": model_name}), **named}
