"""Train the small model that the package ships: in-context copying of repeated random sequences.

Each training row is a random sequence of syllables, repeated to the end of the row. Its first occurrence cannot be
predicted; every later one can, by a head that finds the previous occurrence of the current token and copies what
followed (an induction head, https://arxiv.org/abs/2209.11895). The period differs from row to row, so that no fixed
distance will do.

    python examples/train_induction.py OUTPUT
"""

import functools
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
import tokenizers
import transformers
import typer
from tqdm import tqdm

from conversion import export_checkpoint
from gemma3_jax import Gemma3, Gemma3Config, forward, next_token_loss

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
SYLLABLES = tuple(consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou")

CONFIG = Gemma3Config(
    vocab_size=len(SPECIAL) + len(SYLLABLES),
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    sliding_window=16,
    query_pre_attn_scalar=24,
    layer_types=("sliding_attention", "full_attention") * 2,
    max_position_embeddings=256,
)


def syllable_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per syllable, between spaces; adds <bos> to a text."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *SYLLABLES))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    named = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    # On the left, as Gemma's own.
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **named)


def repeated_sequences(key: jax.Array, rows: int, length: int, shortest: int, longest: int) -> jax.Array:
    """[rows, length] int32: <bos>, then a random sequence of `shortest` to `longest` syllables over and over."""
    key_tokens, key_period = jax.random.split(key)
    tokens = jax.random.randint(key_tokens, (rows, longest), len(SPECIAL), CONFIG.vocab_size)
    period = jax.random.randint(key_period, (rows, 1), shortest, longest + 1)
    # [rows, length - 1]
    repeated = jnp.take_along_axis(tokens, jnp.arange(length - 1)[None] % period, axis=1)
    return jnp.concatenate([jnp.full((rows, 1), CONFIG.bos_token_id), repeated], axis=1)


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnums=(0, 1))
def train_step(params, state, tokens, *, optimizer):
    def loss_of(params):
        return next_token_loss(forward(CONFIG, params, tokens)[0], tokens)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def main(
    output: Annotated[Path, typer.Argument(help="Directory for the checkpoint; must not exist.")],
    steps: int = 1500,
    rows: int = 32,
    seed: int = 0,
) -> None:
    key_params, key_data = jax.random.split(jax.random.key(seed))
    params = Gemma3(CONFIG).init(key_params, jnp.zeros((1, 2), jnp.int32))["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    state = optimizer.init(params)
    progress = tqdm(range(steps), desc="train", unit=" steps")
    for step in progress:
        tokens = repeated_sequences(jax.random.fold_in(key_data, step), rows, 65, 8, 32)
        params, state, loss = train_step(params, state, tokens, optimizer=optimizer)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss:.3f}")
    export_checkpoint(CONFIG, params, output, dtype="bfloat16", tokenizer=syllable_tokenizer())
    print(f"final loss {loss:.3f} nats; {output}")


if __name__ == "__main__":
    typer.run(main)
