"""A small `HookedGemma3` with a tokenizer of ten words, and the Hugging Face model that it is converted from."""

import functools

import jax
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from conversion import convert_state_dict
from gemma3_jax import Gemma3Config, HookedGemma3
from tests.helpers.random_models import hf_config, hf_model, random_tokens

LAYERS = 2
BLOCKS = [f"blocks.{i}.hook_out" for i in range(LAYERS)]
WORDS = ["red", "blue", "green", "sun", "moon", "sea", "and", "the", "over", "under"]
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS])}
PAD, BOS = VOCABULARY["<pad>"], VOCABULARY["<bos>"]
SENTENCE = "the sun over the sea"
SENTENCE_IDS = [VOCABULARY[word] for word in SENTENCE.split()]
# Ids as the model gets them. One shape for most tests, so that each program compiles once: a text of nine tokens with
# its BOS, a padded batch of two, and the ids.
LONG = "red moon under the green sea and sun"
PADDED = ["sun", LONG]
IDS = random_tokens((2, 9))


def make_tokenizer(adds_bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Words to ids; `adds_bos` also puts a BOS before every text, as Gemma's tokenizer does."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


SHAPE = {"num_hidden_layers": LAYERS, "layer_types": ["sliding_attention", "full_attention"]}
CONFIG = Gemma3Config.from_hf(hf_config(**SHAPE))


@functools.cache
def hf():
    return hf_model(**SHAPE)


@functools.cache
def hooked(adds_bos: bool = True, tokenizer: bool = True) -> HookedGemma3:
    params = convert_state_dict(hf().state_dict(), CONFIG)
    return HookedGemma3(CONFIG, params, make_tokenizer(adds_bos) if tokenizer else None)


@functools.cache
def hf_values() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hugging Face's logits on `IDS`, and the input and output of every module, by path."""
    model, values = hf(), {}

    def record(name):
        def hook(module, args, kwargs, out):
            values[f"{name}.input"] = args[0] if args else kwargs["hidden_states"]
            values[f"{name}.output"] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [m.register_forward_hook(record(name), with_kwargs=True) for name, m in model.named_modules() if hooks(m)]
    with torch.no_grad():
        logits = model(torch.as_tensor(IDS)).logits
    for handle in handles:
        handle.remove()
    return logits, values


def hooks(module: torch.nn.Module) -> bool:
    return type(module).__name__ not in ("Gemma3ForCausalLM", "Gemma3TextModel", "ModuleList", "Gemma3RotaryEmbedding")


def assert_close(ours, theirs, bound: float = 2e-5) -> None:
    """Equal within a fraction of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max())


def differ(ours, theirs) -> bool:
    return bool(np.abs(np.asarray(ours) - np.asarray(theirs)).max() > 1e-3)


@functools.cache
def everything():
    """Every captured value on `IDS`, in numpy."""
    return jax.tree.map(np.asarray, hooked().run_with_cache(IDS, return_type=None)[1])
