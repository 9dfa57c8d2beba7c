"""The shipped model with a tokenizer whose tokens are markup, other scripts and characters that reorder a text."""

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from gemma3_jax import TINY, HookedGemma3

HOSTILE = [
    "<script>window.hit=1</script>",
    "<img/src=x/onerror=window.hit=1>",
    "&lt;b&gt;",
    "\"'{{7*7}}",
    "مرحبا",
    "北京",
    "🎉",
    "\u202eevil",
]


def hostile_model():
    """The shipped model with other spellings of its tokens."""
    tiny = HookedGemma3.from_pretrained(TINY, dtype="float32")
    known = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {word: i for i, word in enumerate(HOSTILE, 4)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    return HookedGemma3(tiny.config, tiny.params, wrapped)
