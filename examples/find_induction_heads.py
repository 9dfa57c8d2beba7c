"""Find the induction heads of a model three ways, then take them out and put them back.

    python examples/find_induction_heads.py --output figures
    python examples/find_induction_heads.py google/gemma-3-270m

The shipped model copies: of a random sequence given twice it knows every token the second time. An induction head does
that by looking at what followed the present token before. Here three questions give the same heads:

1. Attention patterns: which heads look there?
2. Activation patching: given a prompt whose first half was exchanged, so that nothing can be copied, which heads'
   outputs from the intact prompt bring the right answers back?
3. Attribution patching: the same question, to first order, from one backward pass.

Then those heads are ablated, which destroys the copying; and patched in all together, which restores it. In the shipped
model the three ways name the same four heads; a large model has more, and there the heads are those that all ways name.
"""

from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.tree_util import Partial
from rich.console import Console
from rich.table import Table

from gemma3_jax import TINY, ActivationCache, HookedGemma3, edits, pictures
from gemma3_jax.analysis import attribution_patching, detect_heads, sweep
from gemma3_jax.cli.demo import repeated_tokens

Z = "blocks.*.attn.hook_z"
HALF = 16
MEASURES = {
    "attention": "attention to the token after",
    "patching": "log-probability regained",
    "attribution": "log-probability regained, estimated",
}


def copying(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """Mean log-probability [] of the right token on the repetition, from logits [b, p, V] and targets [b, half - 1]."""
    # The tokens of the repetition but its first, which nothing foretells
    # [b, p, V] -> [b, half - 1, V]
    log_probs = jax.nn.log_softmax(logits[:, -targets.shape[1] - 1 : -1])
    return jnp.mean(jnp.take_along_axis(log_probs, targets[..., None], axis=-1))


def patched_head(clean: ActivationCache, positions: jax.Array, item: dict[str, Any]) -> dict[str, Any]:
    """The edit of one run: one head's output from the intact prompt, on the repetition."""
    return {Z: edits.only(edits.FromCache(clean), positions=positions, layer=item["layer"], heads=item["head"])}


def three_ways(model: HookedGemma3, clean: np.ndarray, corrupted: np.ndarray) -> dict[str, np.ndarray]:
    """[L, h] for each way: how much of an induction head every head is."""
    metric = Partial(copying, jnp.asarray(clean[:, -HALF + 1 :]))
    second = jnp.arange(HALF + 1, 2 * HALF + 1)
    _, cache = model.run_with_cache(clean, Z, return_type=None)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    layer, head = (axis.ravel() for axis in np.indices((layers, heads)))
    patched = sweep(model, corrupted, Partial(patched_head, cache, second), {"layer": layer, "head": head}, metric)
    # [L, p, h], of which the repetition counts
    attributed = attribution_patching(model, corrupted, cache, metric, "z", ("layer", "pos", "head"))
    return {
        "attention": np.asarray(detect_heads(model, clean, "induction_head", exclude_bos=True)),
        "patching": patched.reshape(layers, heads) - float(metric(model(corrupted))),
        "attribution": np.asarray(attributed[:, HALF + 1 :].sum(axis=1)),
    }


def top_heads(scores: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The `count` (layer, head) with the largest scores, in order of layer and head."""
    best = np.argsort(-scores, axis=None)[:count]
    return sorted((int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in best)


def out_and_back(
    model: HookedGemma3, clean: np.ndarray, corrupted: np.ndarray, found: list[tuple[int, int]]
) -> dict[str, float]:
    """Mean log-probability of the repetition: as it is, without the heads, without as many others, and restored."""
    metric = Partial(copying, jnp.asarray(clean[:, -HALF + 1 :]))
    _, cache = model.run_with_cache(clean, Z, return_type=None)
    second = jnp.arange(HALF + 1, 2 * HALF + 1)
    every = list(np.ndindex(model.config.num_hidden_layers, model.config.num_attention_heads))
    others = [each for each in reversed(every) if each not in found][: len(found)]

    def with_heads(tokens: np.ndarray, edit: Any, heads: list[tuple[int, int]]) -> float:
        hooks = [(f"blocks.{i}.attn.hook_z", edits.only(edit, heads=j, positions=second)) for i, j in heads]
        return float(metric(model.run_with_hooks(tokens, hooks)))

    return {
        "intact prompt": float(metric(model(clean))),
        "intact, these heads ablated": with_heads(clean, edits.Replace(0.0), found),
        "intact, as many others ablated": with_heads(clean, edits.Replace(0.0), others),
        "first half exchanged": float(metric(model(corrupted))),
        "exchanged, these heads patched in": with_heads(corrupted, edits.FromCache(cache), found),
        "exchanged, as many others patched in": with_heads(corrupted, edits.FromCache(cache), others),
    }


def draw(model: HookedGemma3, clean: np.ndarray, scores: dict[str, np.ndarray], found: list, folder: Path) -> None:
    """Write the figures, each as HTML and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    _, cache = model.run_with_cache(clean[:1], "blocks.*.attn.hook_pattern", return_type=None)
    tokens = [str(token) for token in model.to_str_tokens(clean[0])]
    patterns = [cache["pattern", layer][0, head] for layer, head in found]
    figures = {
        "patterns": pictures.attention_patterns(patterns, tokens, found, model.config, title="Induction heads"),
        **{
            name: pictures.patching_heatmap(
                value, model.config, axes="layer head", title=f"Induction heads by {name}", quantity=MEASURES[name]
            )
            for name, value in scores.items()
        },
    }
    for name, figure in figures.items():
        figure.save(folder / f"{name}.html")
        figure.save(folder / f"{name}.png")


def main(
    output: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("figures"),
    source: Annotated[str, typer.Argument(help="A directory with a checkpoint, or its hub id.")] = str(TINY),
    count: Annotated[int, typer.Option(help="How many heads each way names.")] = 4,
) -> None:
    """Find the heads that all three ways name, take them out and put them back, and draw what was found."""
    console = Console()
    model = HookedGemma3.from_pretrained(source, dtype="float32")
    clean = repeated_tokens(model, rows=8, half=HALF)
    corrupted = clean.copy()
    corrupted[:, 1 : HALF + 1] = repeated_tokens(model, rows=8, half=HALF, seed=1)[:, 1 : HALF + 1]
    scores = three_ways(model, clean, corrupted)
    found = {name: top_heads(value, count) for name, value in scores.items()}
    for name, heads in found.items():
        console.print(f"{name}: " + ", ".join(f"L{i}H{j} {scores[name][i, j]:.2f}" for i, j in heads))
    heads = sorted(set.intersection(*map(set, found.values())))
    if not heads:
        raise SystemExit("the three ways do not agree on any head")
    console.print("all three: " + "; ".join(f"layer {i}, head {j}" for i, j in heads))
    table = Table("prompt and heads", "mean log-probability of the repetition")
    for name, value in out_and_back(model, clean, corrupted, heads).items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    draw(model, clean, scores, heads, output)
    console.print(f"Figures: {output}")


if __name__ == "__main__":
    typer.run(main)
