"""The one table: which Hugging Face tensor becomes which parameter, by which step."""

import dataclasses
import re
from collections.abc import Iterable

from conversion.steps import AddOne, Keep, Rearrange, Step, Transpose
from gemma3_jax.config import Gemma3Config

# Where the text model's tensors stand in a checkpoint: as transformers 5 writes the multimodal class with its head and
# without, as the 4b and larger were published, as text models have it, and as EmbeddingGemma has it.
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
# The unembedding stands beside the text model.
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
# The vision half of a multimodal checkpoint, which the text port leaves out.
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its name without prefix, its shape in the checkpoint, its adapter key, and the step between."""

    hf: str
    hf_shape: tuple[int, ...]
    ours: str
    step: Step

    @property
    def path(self) -> tuple[str, ...]:
        """Where the parameter stands in the pytree: blocks.3.attn.q.weight is blocks_3 / attn / q / weight."""
        return tuple(self.ours.replace("blocks.", "blocks_").split("."))


def entries(config: Gemma3Config) -> tuple[Entry, ...]:
    """Every tensor that a checkpoint of this config has, in the model's order."""
    d, v = config.hidden_size, config.vocab_size
    head = () if config.tie_word_embeddings else (Entry("lm_head.weight", (v, d), "unembed.weight", Transpose()),)
    return (
        Entry("embed_tokens.weight", (v, d), "embed.weight", Keep()),
        *(entry for i in range(config.num_hidden_layers) for entry in _block(config, i)),
        Entry("norm.weight", (d,), "ln_final.weight", AddOne()),
        *head,
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


def find_prefix(keys: Iterable[str]) -> str | None:
    """The prefix under which those checkpoint keys hold a text model, or None."""
    keys = set(keys)
    return next((prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in keys), None)


def find_head(keys: Iterable[str]) -> str | None:
    """The key under which a checkpoint holds an unembedding, or None."""
    keys = set(keys)
    return next((name for name in _HEADS if name in keys), None)


def is_vision(key: str) -> bool:
    """Whether a checkpoint key belongs to the vision half of a multimodal model."""
    return _VISION.match(key) is not None
