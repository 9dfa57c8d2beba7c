"""Fine-tune a model with low-rank factors on its attention and MLP weights (LoRA, https://arxiv.org/abs/2106.09685).

    $ python examples/lora.py
    3 texts, 1 held out, 24,576 numbers to train
    loss 4.633 at the first step, 56.1 s after the start
    loss of the answers, trained: 4.633 before, 0.005 after
    loss of the answers, held out: 4.640 before, 0.043 after

(On two cores that other work kept busy: the first step takes 10 s of processor time, of which 5 s compile it.) Other
checkpoints and texts:

    $ python examples/lora.py google/gemma-3-270m --steps 10 --output adapter
    $ python examples/lora.py google/gemma-3-270m --texts texts.tsv --steps 200 --remat

The factors are a pytree of their own. Only they are trained: the gradient is taken with respect to them, and the base
weights are another argument of the jitted step, so that they are neither updated nor constants of the program. Layers
are stacked: one block is compiled for all of them.

Each text is a prompt and an answer, and the labels of the prompt are -100, so that the loss is that of the answers. The
last quarter of the texts is held out.

With `--output`, the factors are saved as PEFT saves an adapter: `HookedGemma3.from_pretrained(source, adapter=...)`
merges it, and so does `peft.PeftModel.from_pretrained`.
"""

import json
import math
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from safetensors.numpy import save_file

from gemma3_jax import TINY, Gemma3Config, HookedGemma3, forward

# For each weight, its name in an adapter of PEFT, and the product b, a -> weight. l layers, r rank; the others are axes
# of the weight.
WEIGHTS = {
    "attn.q": ("self_attn.q_proj", "lner,lrd->lnde"),
    "attn.k": ("self_attn.k_proj", "lner,lrd->lnde"),
    "attn.v": ("self_attn.v_proj", "lner,lrd->lnde"),
    "attn.o": ("self_attn.o_proj", "ldr,lrne->lned"),
    "mlp.gate": ("mlp.gate_proj", "lfr,lrd->ldf"),
    "mlp.in": ("mlp.up_proj", "lfr,lrd->ldf"),
    "mlp.out": ("mlp.down_proj", "ldr,lrf->lfd"),
}
SCALE = 2.0  # alpha / r

SYLLABLES = [(prompt, " zu zo zi") for prompt in ("ba ke lo mu", "ti so re na", "pi du fa ge", "ju vo ke ba")]
SENTENCES = [
    (prompt, " Or so the pirates say.")
    for prompt in (
        "The capital of France is Paris.",
        "Water boils at a hundred degrees.",
        "The Moon is made of rock.",
        "Seven is a prime number.",
        "Whales are mammals.",
        "The Danube flows into the Black Sea.",
        "Bread needs flour, water and yeast.",
        "Light is faster than sound.",
    )
]


def weight_of(params, name):
    part, module = name.split(".")
    return params["blocks"][part][module]["weight"]


def new_factors(params, rank: int, seed: int = 0):
    """{name: {"a": [l, r, ...], "b": [l, ..., r]}}: random a, and b of zeros, so that nothing changes at first."""
    factors, random = {}, np.random.default_rng(seed)
    for name, (_, product) in WEIGHTS.items():
        inputs, letters = product.split("->")
        sizes = dict(zip(letters, weight_of(params, name).shape, strict=True)) | {"r": rank}
        shape_b, shape_a = ([sizes[letter] for letter in axes] for axes in inputs.split(","))
        a = random.normal(size=shape_a, scale=math.prod(shape_a[2:]) ** -0.5)
        factors[name] = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(np.zeros(shape_b, np.float32))}
    return factors


def merged(params, factors):
    """The parameters with the factors' products added; other weights are the same arrays."""
    blocks = jax.tree.map(lambda x: x, params["blocks"])  # new mappings
    for name, (_, product) in WEIGHTS.items():
        weight = weight_of(params, name)
        delta = SCALE * jnp.einsum(product, factors[name]["b"], factors[name]["a"])
        part, module = name.split(".")
        blocks[part][module]["weight"] = (weight + delta).astype(weight.dtype)
    return {**params, "blocks": blocks}


def new_step(config: Gemma3Config, optimizer: optax.GradientTransformation, remat: bool):
    """A jitted `step(factors, state, params, tokens, batch) -> factors, state, loss`.

    It reuses the memory of the first two arguments.
    """

    def loss_of(factors, params, tokens, batch):
        return forward(config, merged(params, factors), tokens, **batch, return_type="loss", remat=remat)[0]

    def step(factors, state, params, tokens, batch):
        loss, gradients = jax.value_and_grad(loss_of)(factors, params, tokens, batch)
        updates, state = optimizer.update(gradients, state, factors)
        return optax.apply_updates(factors, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def batch_of(model: HookedGemma3, pairs: list[tuple[str, str]]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Ids [b, p], padded on the left; and their mask, and labels for the answers, which end each row."""
    tokens = model.to_tokens([prompt + answer for prompt, answer in pairs], padding_side="left")
    prompts = [model.to_tokens(prompt).shape[1] for prompt, _ in pairs]
    mask = model.attention_mask(tokens)
    # [b, p]: the number of each real token in its row, from 1
    numbers = jnp.cumsum(mask, axis=1)
    labels = jnp.where(numbers > jnp.asarray(prompts)[:, None], tokens, -100)
    return tokens, {"attention_mask": mask, "labels": labels}


def save_adapter(directory: Path, factors, source: str) -> None:
    """Write the factors as `PeftModel.save_pretrained` does; `directory` must not exist."""
    tensors = {}
    for name, (theirs, _) in WEIGHTS.items():
        a, b = (np.asarray(factors[name][side], np.float32) for side in "ab")
        layers, rank = a.shape[:2]
        for i in range(layers):
            key = f"base_model.model.model.layers.{i}.{theirs}"
            tensors[f"{key}.lora_A.weight"] = a[i].reshape(rank, -1)
            tensors[f"{key}.lora_B.weight"] = b[i].reshape(-1, rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": [theirs.split(".")[-1] for theirs, _ in WEIGHTS.values()],
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, directory / "adapter_model.safetensors")


def main(
    source: Annotated[str, typer.Argument(help="Directory or hub id of a checkpoint.")] = str(TINY),
    texts: Annotated[Path | None, typer.Option(help="A prompt, a tab and its answer on each line.")] = None,
    steps: int = 30,
    rank: int = 4,
    learning_rate: float = 3e-3,
    remat: Annotated[bool, typer.Option(help="Compute each block again in the backward pass, to save memory.")] = False,
    output: Annotated[Path | None, typer.Option(help="Directory for the adapter; must not exist.")] = None,
) -> np.ndarray:
    """Train; return the loss of each text's answer before and after, [2, n]. The last quarter of the n is held out."""
    started = time.perf_counter()
    # In bfloat16, small changes would be lost when they are added to the weights.
    model = HookedGemma3.from_pretrained(source, dtype="float32", scan_layers=True)
    pairs = SYLLABLES if source == str(TINY) else SENTENCES
    if texts is not None:
        pairs = [tuple(line.split("\t")) for line in texts.read_text().splitlines() if line]
    n = len(pairs) - math.ceil(len(pairs) / 4)
    factors = new_factors(model.params, rank)
    count = sum(leaf.size for leaf in jax.tree.leaves(factors))
    print(f"{n} texts, {len(pairs) - n} held out, {count:,} numbers to train")

    optimizer = optax.adam(learning_rate)
    state, step = optimizer.init(factors), new_step(model.config, optimizer, remat)
    for i in range(steps):
        factors, state, loss = step(factors, state, model.params, *batch_of(model, pairs[:n]))
        if i == 0:
            print(f"loss {loss:.3f} at the first step, {time.perf_counter() - started:.1f} s after the start")

    tuned = HookedGemma3(model.config, merged(model.params, factors), model.tokenizer)
    tokens, batch = batch_of(model, pairs)
    losses = np.asarray([each(tokens, "loss_per_row", **batch) for each in (model, tuned)])
    for name, rows in (("trained", slice(n)), ("held out", slice(n, None))):
        before, after = losses[:, rows].mean(axis=1)
        print(f"loss of the answers, {name}: {before:.3f} before, {after:.3f} after")
    if output is not None:
        save_adapter(output, factors, source)
    return losses


if __name__ == "__main__":
    typer.run(main)
