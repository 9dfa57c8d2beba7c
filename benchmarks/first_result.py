"""Time of a whole process, from its start to its first result, beside Hugging Face.

The port runs twice: with an empty cache of compiled programs, as on the first day, and with one that an earlier process
has filled. The tokenizer has as many tokens as the model, since reading a large one takes a second.
"""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks import peers
from benchmarks.rows import Figure, Row, Settings

TEXT = "The quick brown fox jumps over the lazy dog because"
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
_PORT = (
    "import sys; from gemma3_jax import HookedGemma3\n"
    "model = HookedGemma3.from_pretrained(sys.argv[1], dtype={dtype!r})"
)
_HF = (
    "import sys, torch, transformers; transformers.logging.disable_progress_bar()\n"
    "tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
    "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype={dtype!r})\n"
    "inputs = tokenizer({text!r}, return_tensors='pt')"
)
# (the port's line, Hugging Face's)
CASES = {
    "generate 16 tokens": (
        "print(model.generate({text!r}, max_new_tokens=16, stop_at_eos=False))",
        "out = model.generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)\n"
        "print(tokenizer.decode(out[0]))",
    ),
    "run_with_cache": (
        "logits, cache = model.run_with_cache({text!r}, 'blocks.*.hook_resid_post')\nprint(logits[0, -1, :4])",
        "out = model(**inputs, output_hidden_states=True)\nprint(out.logits[0, -1, :4])",
    ),
}


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each first result and dtype."""
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in settings.dtypes:
            checkpoint = Path(scratch, dtype)
            peers.hf_model(settings.config, dtype).save_pretrained(checkpoint)
            tokenizer(settings.config.vocab_size).save_pretrained(checkpoint)
            for case, lines in list(CASES.items())[: 1 if settings.quick else None]:
                yield _row(case, lines, dtype, checkpoint, settings.rounds)


def tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-pair tokenizer with that many tokens: characters, and pairs of them in the order of a product."""
    characters = [chr(0x20 + i) for i in range(0x5F)] + [chr(0x4E00 + i) for i in range(512)]
    characters = characters[: size - len(SPECIAL)]
    merges = list(itertools.islice(itertools.product(characters, characters), size - len(SPECIAL) - len(characters)))
    vocabulary = [*SPECIAL, *characters, *map("".join, merges)]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Split(" ", "merged_with_next"), decoders.Fuse()
    named = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **named)


def _row(case: str, lines: tuple[str, str], dtype: str, checkpoint: Path, rounds: int) -> Row:
    port, hf = ("\n".join(parts).format(dtype=dtype, text=TEXT) for parts in zip((_PORT, _HF), lines, strict=True))
    seconds: dict[str, list[float]] = {"port": [], "port, programs kept": [], "HF": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as kept:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": kept, "JAX_ENABLE_COMPILATION_CACHE": "true"}
            seconds["port"].append(_process(port, checkpoint, environment))
            seconds["port, programs kept"].append(_process(port, checkpoint, environment))
        seconds["HF"].append(_process(hf, checkpoint, dict(os.environ)))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures = (
        Figure("process / HF's, no program kept", medians["port"] / medians["HF"], 1.2, at_least=False),
        Figure("process / HF's, programs kept", medians["port, programs kept"] / medians["HF"], 0.8, at_least=False),
    )
    return Row(case, dtype, medians, figures)


def _process(script: str, checkpoint: Path, environment: dict[str, str]) -> float:
    """Seconds of a whole process."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{script}\nfailed in a process of its own:\n{done.stderr}")
    return time.perf_counter() - start
