"""How far Hugging Face and the port are from the truth, at every site and in a few gradients."""

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion.gemma3 import Entry, entries
from gemma3_jax.parity import huggingface, port
from gemma3_jax.parity.report import Distances, Row, distance, judge
from gemma3_jax.sites.names import site_names
from gemma3_jax.types import Params

Value: TypeAlias = np.ndarray | jax.Array | torch.Tensor

# At most so many logits are compared at once: 64 MB in float64.
_LOGITS = 2**23
# Of the embedding, the gradient at so many rows is compared, evenly spread, and at those of the prompt.
_ROWS = 4096
# Other parameters whose gradients are compared: one of each kind that backpropagation treats in its own way.
_GRADIENT_KINDS = (
    "attn.q.weight",
    "attn.k.weight",
    "attn.o.weight",
    "attn.k_norm.weight",
    "ln1_post.weight",
    "mlp.in.weight",
)


def compare(
    reference: transformers.PreTrainedModel,
    config: Gemma3Config,
    params: Params,
    tokens: np.ndarray,
    attention_mask: np.ndarray | None = None,
    *,
    rounded: transformers.PreTrainedModel | None = None,
) -> list[Row]:
    """Compare the port with Hugging Face at every site and in a few gradients, on one batch.

    Args:
        reference: Hugging Face's model in float32 and in eager attention; a text model or a multimodal one.
        config: of the port.
        params: of the port.
        tokens: [b, p] integer ids.
        attention_mask: [b, p], 1 at real tokens; only those are compared.
        rounded: Hugging Face's model in bfloat16, by which the port in bfloat16 is judged.
    """
    model = reference if rounded is None else rounded
    gradients = port_gradients(config, params, tokens, attention_mask)
    measured = at_sites(reference, model, config, params, tokens, attention_mask)
    measured |= of_gradients(reference, model, config, gradients, tokens, attention_mask)
    return judge([measured], tokens.shape[1], "float32" if rounded is None else "bfloat16")


def most_logits(config: Gemma3Config) -> int:
    """At how many tokens of a prompt logits are compared, and over how many its loss is taken, at most."""
    return max(2, _LOGITS // config.vocab_size)


def at_sites(
    reference: transformers.PreTrainedModel,
    model: transformers.PreTrainedModel,
    config: Gemma3Config,
    params: Params,
    tokens: np.ndarray,
    attention_mask: np.ndarray | None = None,
) -> dict[str, Distances]:
    """The distances of `model` and of the port from `reference` in float64, by canonical name, and of "logits".

    Logits of a prompt that is longer than `most_logits` are taken at columns that are evenly spread, the last among
    them; with an `attention_mask` at every column.
    """
    p, most = tokens.shape[1], most_logits(config)
    logits_at = np.linspace(0, p - 1, most).round().astype(int) if p > most and attention_mask is None else None
    batch = tokens, attention_mask, logits_at
    truth, hf = huggingface.Run(reference, *batch, exact=True), huggingface.Run(model, *batch)
    ours = port.Run(config, params, *batch)
    distances = _distances(truth.outside, hf.outside, ours.outside, attention_mask)
    for run in (truth, hf, ours):
        run.outside.clear()  # logits are large
    for i in range(config.num_hidden_layers):
        distances |= _distances(truth.block(i), hf.block(i), ours.block(i), attention_mask)
    return {name: distances[name] for name in (*site_names(config), "logits")}


def port_gradients(
    config: Gemma3Config, params: Params, tokens: np.ndarray, attention_mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The port's side of `of_gradients`, by adapter key."""
    return port.gradients(config, params, _entries(config), _rows(config, tokens), tokens, attention_mask)


def of_gradients(
    reference: transformers.PreTrainedModel,
    model: transformers.PreTrainedModel,
    config: Gemma3Config,
    ours: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    attention_mask: np.ndarray | None = None,
) -> dict[str, Distances]:
    """As `at_sites`, of gradients of the mean next-token loss with respect to a few parameters.

    The roundings of a backward pass share its chain of products, so the error of a gradient has few independent parts.
    Its size is their number (`_components`).
    """
    truth, hf = (
        huggingface.gradients(each, _entries(config), _rows(config, tokens), tokens, attention_mask, exact=exact)
        for each, exact in ((reference, True), (model, False))
    )
    sizes = {
        name: 2 / sum(1 / _components(np.subtract(side[name], exact, dtype=np.float64)) for side in (hf, ours))
        for name, exact in truth.items()
    }
    return {
        f"{name} (gradient)": dataclasses.replace(distances, size=sizes[name])
        for name, distances in _distances(truth, hf, ours).items()
    }


def _components(error: np.ndarray) -> float:
    """How many components hold the norm of an error: entries of a vector, singular vectors of a matrix [..., i].

    It is their number where all are alike, and 1 where one is much larger than the rest.

    >>> [_components(np.array(x)) for x in ([2.0, -2.0, 2.0], [5.0, 0.0, 0.0], [[1.0, 1.0], [1.0, 1.0]])]
    [3.0, 1.0, 1.0]
    """
    if not error.any():
        return 1.0
    if error.ndim == 1:
        return float(np.square(error).sum() ** 2 / np.power(error, 4).sum())
    matrix = error.reshape(-1, error.shape[-1])
    gram = matrix.T @ matrix
    return float(np.trace(gram) ** 2 / np.square(gram).sum())


def _distances(
    truth: Mapping[str, Value],
    hf: Mapping[str, Value],
    ours: Mapping[str, np.ndarray | jax.Array],
    attention_mask: np.ndarray | None = None,
) -> dict[str, Distances]:
    def of(name: str, value: Value) -> float:
        return distance(name, _as_numpy(truth[name]), _as_numpy(value), attention_mask)

    return {
        name: Distances(of(name, hf[name]), of(name, value), _rounding(value.dtype), value.size)
        for name, value in ours.items()
    }


def _as_numpy(value: Value) -> np.ndarray:
    return huggingface.as_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)


def _rounding(dtype: np.dtype) -> float:
    """Root mean square of the relative error that rounding leaves, at most: errors are uniform within half a unit."""
    return float(jnp.finfo(dtype).eps) / 12**0.5 if jnp.issubdtype(dtype, jnp.floating) else 0.0


def _entries(config: Gemma3Config) -> tuple[Entry, ...]:
    layers = sorted({0, config.num_hidden_layers // 2, config.num_hidden_layers - 1})
    wanted = {"embed.weight", "ln_final.weight", *(f"blocks.{i}.{kind}" for i in layers for kind in _GRADIENT_KINDS)}
    return tuple(entry for entry in entries(config) if entry.ours in wanted)


def _rows(config: Gemma3Config, tokens: np.ndarray) -> np.ndarray:
    """The rows of the embedding whose gradients are compared, sorted."""
    spread = np.linspace(0, config.vocab_size - 1, min(_ROWS, config.vocab_size)).round().astype(int)
    return np.union1d(spread, tokens)
