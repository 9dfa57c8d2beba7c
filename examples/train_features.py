"""Train sparse autoencoders and transcoders for the layers of a model, and measure how well they explain their sites.

    python examples/train_features.py
    python examples/train_features.py google/gemma-3-270m --texts corpus.txt --layers 9 --width 4096 --k 32 --steps 5000

Without further arguments it trains those that the package ships: an autoencoder of the residual stream and a transcoder
of the MLP, for each layer of the shipped model, in a minute and a half of CPU time. They are `features.TINY`, in the
layout of Gemma Scope 2; `--output DIRECTORY` writes it.

The activations come from a store, which `harvest` writes to a temporary directory: tokens of all texts, shuffled. Texts
at the end are held out for the check. Without a file of texts, one in each line, they are random sequences of tokens,
repeated to the end of the row, which the shipped model copies. What it prints, which is what the check says of each
dictionary, begins:

    62,400 tokens of 960 texts
    resid_post_all/layer_0_width_256_l0_small
      blocks.0.hook_out: FVU 0.062, L0 8.0, dead 5.9%, cosine 0.978, delta loss +0.065 on 4096 tokens
    resid_post_all/layer_1_width_256_l0_small
      blocks.1.hook_out: FVU 0.073, L0 8.0, dead 6.6%, cosine 0.981, delta loss +0.002 on 4096 tokens
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer

from gemma3_jax import TINY, HookedGemma3, features
from gemma3_jax.harvest import ActivationStore, harvest

# The sites that each kind reads and writes, within a block; an autoencoder writes the one that it reads.
KINDS = {
    "resid_post": ("hook_out", None),
    "attn_out": ("attn.o.hook_in", None),
    "mlp_out": ("ln2_post.hook_out", None),
    "transcoder": ("ln2.hook_out", "ln2_post.hook_out"),
}
LONGEST, SHORTEST = 32, 8  # periods of the random sequences


def repeated(model: HookedGemma3, rows: int, seed: int = 0) -> np.ndarray:
    """[rows, 1 + 2 * LONGEST] ids: <bos>, then a random sequence over and over, with another period in each row."""
    r = np.random.default_rng(seed)
    first = 1 + max(model.config.pad_token_id or 0, model.config.bos_token_id or 0, 3)
    ids = r.integers(first, model.config.vocab_size, (rows, LONGEST))
    periods = r.integers(SHORTEST, LONGEST + 1, (rows, 1))
    again = np.take_along_axis(ids, np.arange(2 * LONGEST)[None] % periods, axis=1)
    return np.concatenate([np.full((rows, 1), model.config.bos_token_id), again], axis=1)


def texts_of(model: HookedGemma3, file: Path | None, rows: int, held_out: int) -> tuple[Any, Any]:
    """Texts or token ids to train on, and those that are held out."""
    texts: Any = repeated(model, rows)
    if file is not None:
        texts = [line for line in file.read_text("utf-8").splitlines() if line]
    return texts[:-held_out], texts[-held_out:]


def folder_of(kind: str, layer: int, width: int, k: int) -> str:
    """The name of a dictionary's folder in Gemma Scope 2's layout of dictionaries for all layers."""
    thousands = f"{width // 1024}k" if width % 1024 == 0 else str(width)
    size = "small" if k <= 20 else "medium" if k <= 60 else "big"
    return f"{kind}_all/layer_{layer}_width_{thousands}_l0_{size}"


def main(
    source: Annotated[str, typer.Argument(help="A directory, or a hub id.")] = str(TINY),
    texts: Annotated[Path | None, typer.Option(help="A file with a text in each line.")] = None,
    layers: Annotated[str, typer.Option(help="Numbers such as 5,9; by default all.")] = "",
    kinds: Annotated[str, typer.Option(help=f"Some of {', '.join(KINDS)}.")] = "resid_post,transcoder",
    activation: Annotated[str, typer.Option(help="batchtopk, jumprelu or topk.")] = "batchtopk",
    width: int = 256,
    k: int = 8,
    steps: int = 2000,
    batch: int = 256,
    rate: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a row of the store; longer texts are cut.")] = 260,
    rows: Annotated[int, typer.Option(help="Random sequences, if there is no file of texts.")] = 1024,
    held_out: Annotated[int, typer.Option(help="Texts for the check.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of the two matrices.")] = "float16",
    output: Annotated[Path | None, typer.Option(help="A new directory, for Gemma Scope 2's files.")] = None,
) -> dict[str, tuple[Any, list[Any]]]:
    """Print what the check says of each dictionary; return its report and the history of its training by folder."""
    model = HookedGemma3.from_pretrained(source, dtype="float32")
    corpus, rest = texts_of(model, texts, rows, held_out)
    numbers = [int(layer) for layer in layers.split(",")] if layers else range(model.config.num_hidden_layers)
    places = {
        folder_of(kind, layer, width, k): [site and f"blocks.{layer}.{site}" for site in KINDS[kind]]
        for kind in kinds.split(",")
        for layer in numbers
    }
    sites = list(dict.fromkeys(site for place in places.values() for site in place if site))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        harvest(model, corpus, sites, folder, rows=16, length=length)
        store = ActivationStore(folder)
        print(f"{len(store):,} tokens of {len(corpus):,} texts")
        for name, (site_in, site_out) in places.items():
            history: list[Any] = []
            given = {"k": k, "batch": batch, "steps": steps, "learning_rate": rate, "report": history.append}
            trained = features.train(store, width, activation, site_in=site_in, site_out=site_out, **given)
            matrices = {each: jnp.asarray(getattr(trained, each), dtype) for each in ("W_enc", "W_dec")}
            sae = dataclasses.replace(trained, **matrices)
            results[name] = sae.check(model, rest), history
            print(f"{name}\n  {results[name][0]}")
            if output is not None:
                (output / name).parent.mkdir(parents=True, exist_ok=True)
                features.save(sae, output / name, model_name=Path(source).name if Path(source).is_dir() else source)
    return results


if __name__ == "__main__":
    typer.run(main)
