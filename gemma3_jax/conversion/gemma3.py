"""The table of conversion: the Hugging Face tensor of each parameter, and the step between them."""

import dataclasses
import itertools
import re
from collections.abc import Iterable

import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion.transforms import AddOne, Keep, Rearrange, Step, Transpose
from gemma3_jax.sites.names import path_of

# The path of the embedding in the pytree.
EMBEDDING = ("embed", "weight")
_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head"
# The text model's own modules, which tell its keys from those of other heads if its prefix is empty.
_MODULES = ("embed_tokens", "layers", "norm")
# The vision half of a multimodal checkpoint, which conversion leaves out.
_VISION = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.")
# Buffers that modules compute from the config, and that old versions of transformers saved.
_BUFFER = re.compile(r"(^|\.)(rotary_emb(_local)?\.\w*inv_freq|embed_tokens\.embed_scale|position_ids)$")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its key without prefix, its shape in the checkpoint, its adapter key, and the step between them."""

    hf: str
    hf_shape: tuple[int, ...]
    ours: str
    step: Step

    @property
    def in_text_model(self) -> bool:
        """Whether the key takes the prefix of the text model: no head does."""
        return not (self.hf == "lm_head.weight" or self.ours.startswith("dense_"))

    @property
    def path(self) -> tuple[str, ...]:
        """The path of the parameter in the pytree: blocks.3.attn.q.weight is blocks_3 / attn / q / weight."""
        return path_of(self.ours)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.step.convert(np.broadcast_to(np.float32(0), self.hf_shape)).shape

    def rows(self, index: tuple[slice, ...]) -> slice:
        """The rows of the stored tensor that have a slice of the parameter; all elements of a vector.

        >>> entry = Entry("q_proj.weight", (6, 5), "q.weight", Rearrange("(n h) m -> n m h", heads=3))
        >>> entry.rows((slice(1, 3), slice(0, 5), slice(0, 2)))
        slice(2, 6, None)
        """
        if len(self.hf_shape) == 1:
            return slice(None)
        # The number of the row of each element. It does not decrease along any axis of the parameter.
        numbers = np.broadcast_to(np.arange(self.hf_shape[0])[:, None], self.hf_shape)
        part = np.asarray(self.step.convert(numbers))[index]
        return slice(int(part.flat[0]), int(part.flat[-1]) + 1)


def entries(config: Gemma3Config) -> tuple[Entry, ...]:
    """Every tensor that a checkpoint of this config has, in the model's order."""
    d, v = config.hidden_size, config.vocab_size
    head = () if config.tie_word_embeddings else (Entry("lm_head.weight", (v, d), "unembed.weight", Transpose()),)
    return (
        Entry("embed_tokens.weight", (v, d), "embed.weight", Keep()),
        *(entry for i in range(config.num_hidden_layers) for entry in _block(config, i)),
        Entry("norm.weight", (d,), "ln_final.weight", AddOne()),
        *head,
        *dense_entries(config),
    )


def dense_entries(config: Gemma3Config) -> tuple[Entry, ...]:
    """The dense layers of the embedding head, under their keys in the state dict of a `SentenceTransformer`.

    There, the text model is module 0, and pooling is module 1.
    """
    sizes = () if config.embedding_head is None else config.embedding_head.dense
    pairs = itertools.pairwise((config.hidden_size, *sizes))
    return tuple(
        Entry(f"{j + 1}.linear.weight", (after, before), f"dense_{j}.weight", Transpose())
        for j, (before, after) in enumerate(pairs, start=1)
    )


def _block(config: Gemma3Config, i: int) -> Iterable[Entry]:
    d, f, e = config.hidden_size, config.intermediate_size, config.head_dim
    hf, ours = f"layers.{i}", f"blocks.{i}"
    yield Entry(f"{hf}.input_layernorm.weight", (d,), f"{ours}.ln1.weight", AddOne())
    for name in ("q", "k", "v"):
        n = config.num_attention_heads if name == "q" else config.num_key_value_heads
        proj, key = f"{hf}.self_attn.{name}_proj", f"{ours}.attn.{name}"
        yield Entry(f"{proj}.weight", (n * e, d), f"{key}.weight", Rearrange("(n h) m -> n m h", n))
        if config.attention_bias:
            yield Entry(f"{proj}.bias", (n * e,), f"{key}.bias", Rearrange("(n h) -> n h", n))
    for name in ("q_norm", "k_norm"):
        yield Entry(f"{hf}.self_attn.{name}.weight", (e,), f"{ours}.attn.{name}.weight", AddOne())
    h = config.num_attention_heads
    proj, key = f"{hf}.self_attn.o_proj", f"{ours}.attn.o"
    yield Entry(f"{proj}.weight", (d, h * e), f"{key}.weight", Rearrange("m (n h) -> n h m", h))
    if config.attention_bias:
        yield Entry(f"{proj}.bias", (d,), f"{key}.bias", Keep())
    yield Entry(f"{hf}.post_attention_layernorm.weight", (d,), f"{ours}.ln1_post.weight", AddOne())
    yield Entry(f"{hf}.pre_feedforward_layernorm.weight", (d,), f"{ours}.ln2.weight", AddOne())
    yield Entry(f"{hf}.mlp.gate_proj.weight", (f, d), f"{ours}.mlp.gate.weight", Transpose())
    yield Entry(f"{hf}.mlp.up_proj.weight", (f, d), f"{ours}.mlp.in.weight", Transpose())
    yield Entry(f"{hf}.mlp.down_proj.weight", (d, f), f"{ours}.mlp.out.weight", Transpose())
    yield Entry(f"{hf}.post_feedforward_layernorm.weight", (d,), f"{ours}.ln2_post.weight", AddOne())


def find_prefixes(keys: Iterable[str]) -> list[str]:
    """Whatever stands before the keys of each text model: nothing, `model.`, or wrappers such as `_orig_mod.module.`.

    >>> find_prefixes(["base_model.model.model.embed_tokens.weight", "score.weight"])
    ['base_model.model.model.']
    """
    return [key.removesuffix(_EMBEDDING) for key in keys if f".{key}".endswith(f".{_EMBEDDING}") and not is_vision(key)]


def find_heads(keys: Iterable[str]) -> list[str]:
    """The keys of unembeddings, which are outside the text model, under any prefix."""
    return [key for key in keys if is_unembedding(key)]


def is_unembedding(key: str) -> bool:
    """Whether a checkpoint key is the weight of an unembedding."""
    return f".{key}".endswith(f".{_HEAD}.weight")


def is_vision(key: str) -> bool:
    """Whether a checkpoint key belongs to the vision half of a multimodal model."""
    return _VISION.search(key) is not None


def is_buffer(key: str) -> bool:
    """Whether a checkpoint key is a buffer that the config determines.

    >>> is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq")
    True
    """
    return _BUFFER.search(key) is not None


def is_other_head(key: str, prefix: str) -> bool:
    """Whether a key is outside the text model at `prefix`, its unembedding and the vision half: another head.

    >>> [is_other_head(key, "model.") for key in ("score.weight", "model.layers.0.x.weight", "lm_head.bias")]
    [True, False, False]
    """
    inside = [f"{prefix}{module}." for module in _MODULES] + [prefix] * bool(prefix)
    return not (key.startswith(tuple(inside)) or f".{_HEAD}." in f".{key}" or is_vision(key) or is_buffer(key))
