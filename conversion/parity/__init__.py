"""Site-by-site comparison of the port with Hugging Face: every activation, the logits, and gradients.

With `hooked` and the command line, one of the rooms that see both the model and `conversion`.
"""

import functools
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from conversion.checkpoint import Params, convert_checkpoint
from conversion.files import locate
from conversion.gemma3 import Entry, entries
from conversion.parity import huggingface
from conversion.parity.report import Report, Row, compare_sites, kind_of
from gemma3_jax.config import Gemma3Config
from gemma3_jax.forward import forward
from gemma3_jax.stacking import is_stacked, stack_layers, unstack_layers

__all__ = ["Report", "Row", "compare", "compare_sites", "our_activations", "our_gradients", "parity"]

# Relative error in norm that float32 arithmetic may leave: on small models, and from this width on, where the sums are
# longer. A plain implementation reaches 1e-6 on the former.
SMALL_BAR, REAL_BAR, REAL_WIDTH = 5e-6, 2e-5, 512
# The parameters whose gradients are compared: one of each kind that backpropagation treats in its own way.
_GRADIENT_KINDS = (
    "attn.q.weight",
    "attn.k.weight",
    "attn.o.weight",
    "attn.k_norm.weight",
    "ln1_post.weight",
    "mlp.in.weight",
)


def parity(
    source: str | os.PathLike[str],
    dtype: Literal["float32", "bfloat16"] = "float32",
    tokens: int = 64,
    revision: str | None = None,
    seed: int = 0,
) -> Report:
    """Run a checkpoint through Hugging Face (torch, on the CPU) and the port (JAX's default device), and compare.

    float32: the port's relative error must be within a fixed bar at every site; its gradients are compared with Hugging
    Face's in float64 (`compare`). bfloat16: at every site the port must be no further from Hugging Face in float32 than
    Hugging Face in bfloat16 is, up to the sampling error of that comparison (`compare_bfloat16`).

    Args:
        source: directory or hub id.
        dtype: of the weights and activations on both sides.
        tokens: length of the prompt, random ids.
        revision: branch, tag or commit on the hub.
        seed: of the prompt.

    >>> from conversion.parity import parity
    >>> from gemma3_jax import TINY
    >>> parity(TINY).passed
    True
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; parity takes 'float32' and 'bfloat16'")
    if tokens < 2:
        raise ValueError(f"tokens is {tokens}; a prompt that has a loss needs 2 at least")
    directory = locate(source, revision)
    config, params = convert_checkpoint(directory, dtype)
    # Torch gives the embedding of the padding token no gradient, whoever uses it: the prompt does without.
    allowed = np.delete(np.arange(config.vocab_size), config.pad_token_id or 0)
    ids = np.random.default_rng(seed).choice(allowed, (1, tokens))
    reference = huggingface.load(directory, torch.float32)
    if dtype == "float32":
        rows = compare(reference, config, params, ids)
    else:
        rows = compare_bfloat16(reference, huggingface.load(directory, torch.bfloat16), config, params, ids)
    device = jax.devices()[0]
    platform = f"{device.platform} ({device.device_kind})"
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    window = config.sliding_window
    note = (
        f"no token is further than the window of {window} from another; ask for more tokens" if tokens <= window else ""
    )
    return Report(os.fspath(source), dtype, tokens, f"{platform}, {versions}", tuple(rows), note)


def compare(
    hf_model: transformers.PreTrainedModel,
    config: Gemma3Config,
    params: Params,
    tokens: np.ndarray,
    attention_mask: np.ndarray | None = None,
    bar: float | None = None,
) -> list[Row]:
    """Compare a float32 Hugging Face model with the port at every site and in a few gradients.

    Args:
        hf_model: in eager attention; a text model or a multimodal one.
        config: of the port.
        params: of the port.
        tokens: [b, p] integer ids.
        attention_mask: [b, p], 1 at real tokens; only those are compared.
        bar: relative error allowed; by default that of the model's width.
    """
    if bar is None:
        bar = REAL_BAR if config.hidden_size >= REAL_WIDTH else SMALL_BAR
    wanted = huggingface.activations(hf_model, tokens, attention_mask)
    rows = compare_sites(wanted, our_activations(config, params, tokens, attention_mask), bar, attention_mask)
    chosen = _gradient_entries(config)
    exact, theirs = (
        _as_gradients(huggingface.gradients(hf_model, chosen, tokens, attention_mask, exact=exact))
        for exact in (True, False)
    )
    # Sums that nearly cancel (in the norms of q and k) leave float32 gradients further from the truth than the bar, in
    # Hugging Face too: where they do, the port may be as far as Hugging Face is.
    bars = {row.kind: max(bar, row.relative) for row in compare_sites(exact, theirs, np.inf)}
    ours = _as_gradients(our_gradients(config, params, chosen, tokens, attention_mask))
    return rows + compare_sites(exact, ours, bars)


def compare_bfloat16(
    reference: transformers.PreTrainedModel,
    hf_model: transformers.PreTrainedModel,
    config: Gemma3Config,
    params: Params,
    tokens: np.ndarray,
) -> list[Row]:
    """Compare the port in bfloat16 with `reference` in float32; the bar is the error of `hf_model` in bfloat16.

    Both errors are norms over N roundings. Such a norm has a relative standard deviation of 1 / sqrt(2 N), and the
    difference of two 1 / sqrt(N): the bar has three of these added, which is 1 % at 100,000 values, 27 % at 128.
    """
    wanted = huggingface.activations(reference, tokens)
    sizes = {kind_of(name): value.size for name, value in wanted.items()}
    theirs = compare_sites(wanted, huggingface.activations(hf_model, tokens), np.inf)
    bars = {row.kind: row.relative * (1 + 3 / np.sqrt(sizes[row.kind])) for row in theirs}
    return compare_sites(wanted, our_activations(config, params, tokens), bars)


def our_activations(
    config: Gemma3Config, params: Params, tokens: np.ndarray, attention_mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Every site of the port in float32, by canonical name, and "logits"."""

    mask = None if attention_mask is None else jnp.asarray(attention_mask)
    logits, cache = _every_site(config, params, jnp.asarray(tokens), mask)
    return {name: np.asarray(value, np.float32) for name, value in {**cache, "logits": logits}.items()}


def our_gradients(
    config: Gemma3Config,
    params: Params,
    chosen: tuple[Entry, ...],
    tokens: np.ndarray,
    attention_mask: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Gradients of the port's mean next-token loss with respect to the chosen parameters, by adapter key."""

    by_block = unstack_layers(config, params)
    leaves = [_at(by_block, entry.path) for entry in chosen]
    mask = None if attention_mask is None else jnp.asarray(attention_mask)
    found = _gradients(config, chosen, leaves, params, jnp.asarray(tokens), mask)
    return {entry.ours: np.asarray(leaf, np.float32) for entry, leaf in zip(chosen, found, strict=True)}


@functools.partial(jax.jit, static_argnames="config")
def _every_site(config, params, tokens, attention_mask):
    return forward(config, params, tokens, "**", attention_mask=attention_mask)


@functools.partial(jax.jit, static_argnames=("config", "chosen"))
@functools.partial(jax.grad, argnums=2)
def _gradients(config, chosen, leaves, params, tokens, attention_mask):
    by_block = unstack_layers(config, params)
    for entry, leaf in zip(chosen, leaves, strict=True):
        by_block = _replaced(by_block, entry.path, leaf)
    params = stack_layers(config, by_block) if is_stacked(params) else by_block
    return forward(config, params, tokens, attention_mask=attention_mask, return_type="loss")[0]


def _gradient_entries(config: Gemma3Config) -> tuple[Entry, ...]:
    layers = sorted({0, config.num_hidden_layers // 2, config.num_hidden_layers - 1})
    wanted = {"embed.weight", "ln_final.weight", *(f"blocks.{i}.{kind}" for i in layers for kind in _GRADIENT_KINDS)}
    return tuple(entry for entry in entries(config) if entry.ours in wanted)


def _as_gradients(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name} (gradient)": leaf for name, leaf in leaves.items()}


def _at(params: Params, path: tuple[str, ...]) -> Any:
    return params[path[0]] if len(path) == 1 else _at(params[path[0]], path[1:])


def _replaced(params: Params, path: tuple[str, ...], leaf: Any) -> Params:
    inner = leaf if len(path) == 1 else _replaced(params[path[0]], path[1:], leaf)
    return {**params, path[0]: inner}
