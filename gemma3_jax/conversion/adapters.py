"""PEFT adapters, merged into the tensors of their base: each tensor when it is read, without torch or peft."""

import collections
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from gemma3_jax import reading
from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion import files, lora
from gemma3_jax.conversion.adapter_config import CONFIG, REMEDY, WEIGHTS, AdapterConfig, read_adapter_config
from gemma3_jax.conversion.dtypes import known_dtypes, parameter_dtype
from gemma3_jax.conversion.finite import first_not_finite, is_finite
from gemma3_jax.conversion.gemma3 import entries
from gemma3_jax.conversion.plan import equal_bits, find_head, find_prefix
from gemma3_jax.conversion.tensors import Reader, Tensors, reader_of
from gemma3_jax.conversion.words import listed
from gemma3_jax.reading import NUMPY_DTYPES, CheckpointError, Stored, read_header

_log = logging.getLogger(__name__)

Change = Callable[[np.ndarray], np.ndarray]

_PARTS = (
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    *("ia3_l", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "trainable_tokens_delta", "weight", "bias"),
)
# A key of an adapter: a module, and a part of it. Modules that PEFT wraps have the base's weights one level down.
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.(?:base_layer|modules_to_save|token_adapter))?"
    rf"\.(?P<part>{'|'.join(map(re.escape, _PARTS))})(?P<end>\.weight)?"
)
# The name of a text module, without the prefix that the model's class gives it.
_TEXT = re.compile(r"(?:^|\.)(layers\.\d+\..+|embed_tokens|norm|lm_head)$")
_TUNABLE = re.compile(r"_proj$|^embed_tokens$|^lm_head$")
_VISION = re.compile(r"(?:^|\.)(?:vision_tower|multi_modal_projector)\.")
_MERGED = "as in PEFT's merge_and_unload, the merged matrix is both the embedding and the unembedding"


@dataclasses.dataclass(frozen=True)
class _Module:
    """What an adapter stores for one module: the key of each part. `text` is its name in the text model."""

    name: str
    text: str
    parts: Mapping[str, str]

    @property
    def is_tuned(self) -> bool:
        """Whether the adapter changes a weight of the base, rather than bringing a weight of its own."""
        return bool(set(self.parts) - {"weight", "bias", "trainable_tokens_delta"})


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """An adapter whose headers have been read."""

    file: Path
    config: AdapterConfig
    stored: Mapping[str, Stored]
    modules: tuple[_Module, ...]

    def read(self, key: str) -> np.ndarray:
        """A tensor, after a check that it is finite."""
        tensor = reading.map_tensor(key, self.stored[key])
        if not is_finite(tensor):
            raise CheckpointError(f"{self.file}: {key} has NaN or infinity, first at {first_not_finite(tensor)}")
        return tensor

    def part(self, module: _Module, part: str, shape: Iterable[int]) -> Callable[[], np.ndarray]:
        """A function that reads a part in float32, after a check of its shape."""
        key = module.parts.get(part)
        if key is None:
            raise CheckpointError(f"{self.file} lacks {part} of {module.name}")
        stored, required = list(self.stored[key].shape), list(shape)
        if stored != required:
            raise CheckpointError(
                f"{self.file}: {key} has shape {stored}; the base model and {CONFIG} require {required}"
            )
        return lambda: self.read(key).astype(np.float32)


def is_adapter(directory: Path) -> bool:
    """Whether a directory has a PEFT adapter."""
    return os.path.lexists(directory / CONFIG)


def base_of(directory: Path) -> tuple[str, str | None]:
    """The base model that an adapter's config names: a path or a hub id, and its revision.

    Raises:
        CheckpointError: the config does not name a base.
    """
    config = read_adapter_config(directory)
    if config.base is None:
        raise CheckpointError(f"{config.file} does not name a base model; {base_remedy(directory)}")
    return config.base, config.revision


def base_remedy(directory: Path) -> str:
    """What to do if an adapter's config does not lead to its base model."""
    return f"give the base model and adapter={str(directory)!r}"


def merge_adapter(
    config: Gemma3Config, base: Tensors, directory: Path, dtype: DTypeLike | None = None
) -> tuple[Gemma3Config, Tensors]:
    """The config and the tensors of a base with a PEFT adapter merged into it; only headers are read.

    A tensor is merged when it is read, in `dtype` (None: that of the base; float32 for float16), as PEFT merges into a
    base that was loaded in that dtype.

    Args:
        config: shape of the base.
        base: its tensors.
        directory: an adapter as `PeftModel.save_pretrained` writes it.
        dtype: "float32", "bfloat16" or None.

    Returns:
        The changed config and tensors. The config is no longer tied if the adapter brings an embedding or an
        unembedding of its own, and has the adapter's vocabulary if these are larger.

    Raises:
        CheckpointError: the adapter is damaged, has a type that cannot be merged, or does not match the base.
    """
    adapter = _read_adapter(directory)
    prefix, stored_head = find_prefix(config, base), find_head(base)
    was_tied = config.tie_word_embeddings
    if was_tied and adapter.config.ties:
        # The adapter of the unembedding is a copy of that of the embedding: only one of them changes the tied weight.
        modules = tuple(module for module in adapter.modules if module.text != "lm_head" or not module.is_tuned)
        adapter = dataclasses.replace(adapter, modules=modules)
    config = _untied(config, adapter)
    keys = {entry.hf: prefix + entry.hf for entry in entries(config)}
    embedding = keys["embed_tokens.weight"]
    keys["lm_head.weight"] = embedding if config.tie_word_embeddings else (stored_head or "lm_head.weight")
    _check_modules(adapter, keys)
    # A tied model has no unembedding to start from.
    start = {keys["lm_head.weight"]: embedding} if was_tied and not config.tie_word_embeddings else {}
    shapes = {**base.shapes, **{key: base.shapes[of] for key, of in start.items()}}

    replaced: dict[str, str] = {}
    changes: dict[str, list[Change]] = collections.defaultdict(list)
    for module in adapter.modules:
        for kind in ("weight", "bias"):
            key, own = keys.get(f"{module.text}.{kind}"), module.parts.get(kind)
            if key is None or key not in shapes:  # plan_of names a key that the base lacks
                continue
            if own is not None:
                replaced[key], shapes[key] = own, adapter.stored[own].shape
            changes[key] += _changes(adapter, module, kind, shapes[key])
    if config.tie_word_embeddings and stored_head is not None:  # the copy of the embedding that the base stores
        replaced |= {stored_head: replaced[embedding]} if embedding in replaced else {}
        changes[stored_head] = changes[embedding]
    changed = {key for key, several in changes.items() if several or key in replaced} | set(start)
    norms = [key for key in (*replaced, *changes) if key.endswith("norm.weight") and (key in replaced or changes[key])]
    if base.norms_hold_one and norms:
        raise CheckpointError(
            f"{adapter.file} changes {listed(norms)}, and {base.checkpoint} stores norms in another form; give the "
            "base model as safetensors"
        )
    asked = parameter_dtype(base.default_dtype if dtype is None else dtype)

    def open(key: str) -> Reader:
        if key not in changed:
            return base.open(key)
        of_base = base.read(start.get(key, key))
        target = asked or (np.dtype("float32") if of_base.dtype == np.float16 else of_base.dtype)
        weight = (adapter.read(replaced[key]) if key in replaced else of_base).astype(target)
        for change in changes[key]:
            weight = change(weight)
        return reader_of(weight)

    def file_of(key: str) -> str:
        return (
            f"{adapter.file} merged into {base.file_of(start.get(key, key))}" if key in changed else base.file_of(key)
        )

    dtypes = {**base.dtypes, **{key: base.dtypes[of] for key, of in start.items()}}
    merged = dataclasses.replace(base, shapes=shapes, dtypes=dtypes, open=open, file_of=file_of)
    if embedding in replaced and len(shapes[embedding]) == 2:
        config = dataclasses.replace(config, vocab_size=shapes[embedding][0])
    if start and shapes[embedding] == shapes[keys["lm_head.weight"]]:
        [head] = start
        if equal_bits(merged.read(embedding), merged.read(head)):
            del shapes[head]
            config = dataclasses.replace(config, tie_word_embeddings=True)
    return config, merged


def _read_adapter(directory: Path) -> _Adapter:
    config, file = read_adapter_config(directory), directory / WEIGHTS
    if not os.path.lexists(file):
        has_pickle = (directory / "adapter_model.bin").exists()
        pickled = "; adapter_model.bin is not read, because a pickle can run code" if has_pickle else ""
        raise CheckpointError(f"{file} is missing{pickled}; load the adapter in PEFT and write it with save_pretrained")
    stored = read_header(file)
    modules: dict[str, dict[str, str]] = {}
    for key, tensor in stored.items():
        match = _KEY.fullmatch(key.replace(".default", ""))  # the adapter's name, which some tools keep
        if match is None or (match["end"] and match["part"] != "lora_magnitude_vector"):
            raise CheckpointError(f"{file} has {key}, which this library does not merge; {REMEDY}")
        if str(NUMPY_DTYPES.get(tensor.dtype)) not in files.DTYPES:
            raise CheckpointError(f"{file}: {key} has dtype {tensor.dtype}; this port reads {known_dtypes()}")
        modules.setdefault(match["module"], {})[match["part"]] = key
    if not modules:
        raise CheckpointError(f"{file} has no tensors; save the adapter again with PEFT's save_pretrained")
    vision = [name for name in modules if _VISION.search(name)]
    if vision:
        _log.warning("%s: left out %s, which the text model does not use", file, listed(vision))
    matches = {name: _TEXT.search(name) for name in modules if name not in vision}
    text = [_Module(name, match[1] if match else name, modules[name]) for name, match in matches.items()]
    # PEFT merges in the order of the model, where the unembedding is last.
    return _Adapter(file, config, stored, tuple(sorted(text, key=lambda module: module.text == "lm_head")))


def _untied(config: Gemma3Config, adapter: _Adapter) -> Gemma3Config:
    """The config without tied embeddings if `modules_to_save` gives the adapter one of them as its own."""
    ends = [module for module in adapter.modules if module.text in ("embed_tokens", "lm_head")]
    if not config.tie_word_embeddings or not ends:
        return config
    if any("weight" in module.parts and adapter.config.is_saved(module.name) for module in ends):
        return dataclasses.replace(config, tie_word_embeddings=False)
    changing = [
        module.name
        for module in ends
        if (module.is_tuned and not adapter.config.ties)
        or (module.text == "lm_head" and "trainable_tokens_delta" in module.parts)
    ]
    if changing:
        _log.warning("%s changes %s of a base with tied embeddings: %s", adapter.file, listed(changing), _MERGED)
    return config


def _check_modules(adapter: _Adapter, keys: Mapping[str, str]) -> None:
    """Raise if the adapter has weights for other modules than the base has, or than its config names."""
    config, file = adapter.config, adapter.file
    texts = {key.rpartition(".")[0] for key in keys}
    foreign = {module.name: module for module in adapter.modules if module.text not in texts}
    heads = [name for name, module in foreign.items() if not module.is_tuned and config.is_saved(name)]
    if heads:
        _log.warning("%s: left out %s, which the language model does not have", file, listed(heads))
    wrong = sorted(set(foreign) - set(heads))
    if wrong:
        raise CheckpointError(
            f"{file} has weights for {listed(wrong)}, which the base model does not have; load it with the base that "
            "it was trained on"
        )
    for module in adapter.modules:
        biases = [key for part, key in module.parts.items() if part.endswith("bias")]
        if biases and f"{module.text}.bias" not in keys:
            raise CheckpointError(f"{file} has {listed(biases)}, but the base model has no such bias")
    # The names that PEFT matched with the config: those of the model's class.
    inside = next((m.name.removesuffix(m.text) for m in adapter.modules if m.text.startswith("layers.")), "model.")
    names = {text: text if text == "lm_head" else inside + text for text in texts}
    tuned = {module.text for module in adapter.modules if module.is_tuned}
    saved = {module.text for module in adapter.modules if "weight" in module.parts}
    for text, name in names.items():
        targeted = config.targets(name) if _TUNABLE.search(text) else None
        if text == "lm_head" and config.ties:
            continue
        if config.is_saved(name) and text not in saved:
            raise CheckpointError(f"{config.file} has {name} in modules_to_save, but {file.name} lacks its weight")
        if targeted is not None and targeted != (text in tuned):
            does, has = ("targets", "lacks") if targeted else ("does not target", "has")
            raise CheckpointError(
                f"{config.file} {does} {name}, but {file.name} {has} weights for it; take both files from one save"
            )


def _changes(adapter: _Adapter, module: _Module, kind: str, shape: tuple[int, ...]) -> list[Change]:
    """What the adapter does to the weight or the bias of a module, in order; every shape is checked here."""
    config, parts = adapter.config, module.parts
    part = functools.partial(adapter.part, module)
    if "ia3_l" in parts:
        stored = adapter.stored[parts["ia3_l"]].shape
        factor = part("ia3_l", (1, shape[-1]) if stored[:1] == (1,) else (shape[0], 1))
        if kind == "bias":
            return [] if stored[:1] == (1,) else [lambda bias: lora.scale_by(bias, factor()[:, 0])]
        return [lambda weight: lora.scale_by(weight, factor())]
    if kind == "bias":
        if "lora_B.bias" not in parts:
            return []
        bias, scale = part("lora_B.bias", shape), config.scale(module.name)
        return [lambda weight: lora.add(weight, bias() * np.float32(scale))]
    if "trainable_tokens_delta" in parts:
        rows = config.tokens(module.name)
        if not all(0 <= row < shape[0] for row in rows):
            raise CheckpointError(f"{config.file} trains tokens outside the base's vocabulary of {shape[0]}")
        values = part("trainable_tokens_delta", (len(rows), shape[1]))
        return [lambda weight: lora.replace_rows(weight, rows, values())]
    if not module.is_tuned:
        return []
    rank, scale = config.rank(module.name), config.scale(module.name)
    if len(shape) != 2:
        raise CheckpointError(f"{adapter.file} has low-rank weights for {module.name}, which is not a matrix")
    if any(name.startswith("hada_") for name in parts):
        left, right = (shape[0], rank), (rank, shape[1])
        factors = [part(f"hada_w{i}_{side}", (left, right)[side == "b"]) for i in (1, 2) for side in "ab"]
        return [lambda weight: lora.add(weight, lora.loha_delta(*[read() for read in factors], scale=scale))]
    return [_low_rank(part, parts, shape, rank, scale, dora=bool(config.raw.get("use_dora")))]


def _low_rank(
    part: Callable[..., Callable[[], np.ndarray]],
    parts: Mapping[str, str],
    shape: tuple[int, ...],
    rank: int,
    scale: float,
    *,
    dora: bool,
) -> Change:
    """LoRA or DoRA of a linear layer [o, i], or of an embedding [V, d], whose factors are transposed."""
    is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    outside, inside = shape[::-1] if is_embedding else shape
    a = part("lora_embedding_A" if is_embedding else "lora_A.weight", (rank, inside))
    b = part("lora_embedding_B" if is_embedding else "lora_B.weight", (outside, rank))

    def delta() -> np.ndarray:
        product = lora.lora_delta(a(), b(), scale)
        return product.T if is_embedding else product

    if not dora and "lora_magnitude_vector" in parts:
        raise CheckpointError(f"{parts['lora_magnitude_vector']} belongs to DoRA, but {CONFIG} does not set use_dora")
    if not dora:
        # For an embedding, PEFT rounds the delta before it adds it.
        return lambda weight: lora.add(weight, delta().astype(weight.dtype if is_embedding else np.float32))
    magnitude = part("lora_magnitude_vector", (outside,))
    return lambda weight: lora.add_dora(weight, delta(), magnitude(), axis=0 if is_embedding else 1)
