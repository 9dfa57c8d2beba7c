"""What both sides run on: a page of plain English, or random ids for a model that cannot read it.

Random ids are a poor test of a trained model: one prompt in ten amplifies rounding forty times, Hugging Face's and the
port's by chance alike, where text amplifies it two to six times.
"""

from pathlib import Path

import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.types import Tokenizer

_PAGE = Path(__file__).with_name("page.txt")
# A tokenizer that leaves more of the page unknown was not made for English.
_MOST_UNKNOWN = 0.1


def page() -> str:
    """Plain English prose, some 2,600 words in five parts, in paragraphs of one line each."""
    paragraphs = _PAGE.read_text(encoding="utf-8").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def prompts_for(
    config: Gemma3Config, tokenizer: Tokenizer | None, tokens: int, count: int, seed: int = 0
) -> list[np.ndarray]:
    """`count` prompts [1, tokens] that begin with BOS.

    Args:
        config: of the model; without a `bos_token_id` in its vocabulary, prompts have none.
        tokenizer: a Hugging Face tokenizer, or None.
        tokens: length of each.
        count: how many: of the page's text from as many places, evenly spread; behind its end it begins again.
        seed: of the random ids.
    """
    text = page_ids(config, tokenizer)
    bos = [] if config.bos_token_id is None or config.bos_token_id >= config.vocab_size else [config.bos_token_id]
    n = tokens - len(bos)
    if text is None:
        rows = np.random.default_rng(seed).choice(_ordinary_ids(config, tokenizer), (count, n))
    else:
        starts = np.arange(count) * len(text) // count
        # [count, n]
        rows = np.take(text, starts[:, None] + np.arange(n), mode="wrap")
    return [np.array([[*bos, *row]], np.int64) for row in rows]


def page_ids(config: Gemma3Config, tokenizer: Tokenizer | None) -> np.ndarray | None:
    """The page as ids [n], or None where the tokenizer, or the model's vocabulary, does not have its words."""
    if tokenizer is None:
        return None
    ids = np.array(tokenizer(page(), add_special_tokens=False)["input_ids"], np.int64)
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    unknown = np.mean(ids == unknown_id) if unknown_id is not None else 0
    return None if not ids.size or unknown > _MOST_UNKNOWN or ids.max() >= config.vocab_size else ids


def _ordinary_ids(config: Gemma3Config, tokenizer: Tokenizer | None) -> np.ndarray:
    """Every id but those that mean something by themselves, such as padding."""
    stop = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    special = {config.pad_token_id, config.bos_token_id, *stop, *getattr(tokenizer, "all_special_ids", ())}
    allowed = np.setdiff1d(np.arange(config.vocab_size), [i for i in special if i is not None])
    return allowed if allowed.size else np.arange(config.vocab_size)
