"""Models of `transformers` and PEFT in memory."""

import copy
import dataclasses

from jax.typing import DTypeLike

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion.assemble import assemble
from gemma3_jax.conversion.plan import equal_bits, find_head, find_prefix
from gemma3_jax.conversion.tensors import of_state_dict
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Params


def convert_model(model: object, dtype: DTypeLike | None = None) -> tuple[Gemma3Config, Params]:
    """The config and the parameters of a model in memory, which does not change.

    Args:
        model: a Gemma 3 of `transformers`, or a PEFT model around one; see `HookedGemma3.from_hf`.
        dtype: as in `convert_checkpoint`.

    Raises:
        ConfigError, CheckpointError: the model is not a Gemma 3, or its weights cannot be converted.
    """
    model = _without_adapters(model)
    if not hasattr(model, "state_dict") or not hasattr(model, "config"):
        raise CheckpointError(f"{type(model).__name__} is not a model of transformers; give one with a Gemma 3 config")
    config = Gemma3Config.from_hf(model.config)
    stop = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    config = config if stop is None else config.stopping_at(stop)
    state = model.state_dict()
    absent = next((key for key, tensor in state.items() if getattr(tensor, "is_meta", False)), None)
    if absent is not None:
        raise CheckpointError(f"{absent} is on the meta device, without data; load the model without offloading")
    tensors = of_state_dict(state)
    head = find_head(tensors)
    if config.tie_word_embeddings and head is not None:
        # Whatever its config says, a model in memory computes with the unembedding that it has.
        is_tied = equal_bits(tensors.read(head), tensors.read(f"{find_prefix(config, tensors)}embed_tokens.weight"))
        config = dataclasses.replace(config, tie_word_embeddings=is_tied)
    return config, assemble(config, tensors, dtype)


def _without_adapters(model: object) -> object:
    """The model, or a copy of it with its PEFT adapters merged."""
    if not hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False):
        return model
    if not hasattr(model, "merge_and_unload"):
        raise CheckpointError(
            f"{type(model).__name__} has adapters that PEFT cannot merge; wrap the base in a PeftModel, or save the "
            "adapter and give its directory to from_pretrained"
        )
    merged = copy.deepcopy(model).merge_and_unload()
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged
