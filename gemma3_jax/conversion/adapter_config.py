"""The `adapter_config.json` of a PEFT adapter: what it says about each module, and which adapters cannot be merged."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import regex

from gemma3_jax.conversion import files
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Settings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KINDS = ("LORA", "IA3", "LOHA", "TRAINABLE_TOKENS")
REMEDY = "merge it in PEFT with merge_and_unload, write the result with save_pretrained, and load that"

_SECONDS = 1  # a pattern takes microseconds

# Fields of LoraConfig that change what the weights mean. Their values are falsy in a plain adapter.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Initialisations that leave the base's weights as they are. The others subtract something from the base when PEFT loads
# the adapter, so the adapter's weights do not belong to the base as it is stored.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The config of an adapter, checked.

    Attributes:
        file: where it was read.
        kind: PEFT's type: "LORA", "IA3", "LOHA" or "TRAINABLE_TOKENS".
        base: the base model that the config names, a path or a hub id; or None.
        revision: revision of the base on the hub, or None.
        raw: the JSON object.
    """

    file: Path
    kind: str
    base: str | None
    revision: str | None
    raw: Settings

    def rank(self, module: str) -> int:
        """The rank of a module."""
        return _positive(self, "r", _by_pattern(self.raw.get("rank_pattern"), module, self.raw.get("r", 8)))

    def scale(self, module: str) -> float:
        """The factor of a module's delta: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
        name = "alpha" if self.kind == "LOHA" else "lora_alpha"
        alpha = _by_pattern(self.raw.get("alpha_pattern"), module, self.raw.get(name, 8))
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.file}: {name} of {module} is {alpha!r}; it must be a number")
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.raw.get("use_rslora") else alpha / rank

    @property
    def ties(self) -> bool:
        """Whether PEFT trained one adapter for tied embeddings, of which it stores two copies."""
        return bool(self.raw.get("ensure_weight_tying"))

    def is_saved(self, module: str) -> bool:
        """Whether `modules_to_save` makes the adapter store the whole module, by itself or inside another.

        Source: `peft.utils.other._set_trainable`, where a name matches the end of a module's name.
        """
        saved = _names(self, "modules_to_save") or ()
        parts = module.split(".")
        whole = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(name.endswith(end) for name in whole for end in saved)

    def tokens(self, module: str) -> list[int]:
        """The ids of the tokens that a module's rows replace."""
        field = "token_indices" if self.kind == "TRAINABLE_TOKENS" else "trainable_token_indices"
        ids = self.raw.get(field)
        if isinstance(ids, Mapping):
            ids = next((ids[name] for name in ids if _ends_with(module, name)), None)
        if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(f"{self.file}: {field} of {module} is {ids!r}; it must be a list of token ids")
        return ids

    def targets(self, module: str) -> bool | None:
        """Whether the config gives a linear or embedding module weights; None if the config does not say.

        Source: `peft.tuners.tuners_utils.check_target_module_exists`.
        """
        targets, excluded = _names(self, "target_modules"), _names(self, "exclude_modules")
        if targets is None or self.kind == "TRAINABLE_TOKENS":
            return None
        saved = _names(self, "modules_to_save") or ()
        is_whole = any(_matches(rf"(^|.*\.){name}($|\..*)", module) for name in saved)
        if is_whole or (excluded and _is_named(module, excluded)):
            return False
        if targets == "all-linear":
            return not _ends_with(module, "embed_tokens") and not _ends_with(module, "lm_head")
        if not _is_named(module, targets):
            return False
        layers = self.raw.get("layers_to_transform")
        # PEFT ignores layers_to_transform if target_modules is a pattern or has the whole name.
        if layers is None or layers == [] or isinstance(targets, str) or module in targets:
            return True
        layer = self._layer(module)
        return layer is not None and layer in (layers if isinstance(layers, list) else [layers])

    def _layer(self, module: str) -> int | None:
        """The layer of a module, by `layers_pattern`: the first number in its name after a part with that name."""
        patterns = _names(self, "layers_pattern") or [r"[^.]*"]
        starts = r"(?:^|.*?\.)" if self.raw.get("layers_pattern") else r".*?\."
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if match := _matches(rf"{starts}{pattern}\.(\d+)\.", module):
                return int(match.group(1))
        return None


def read_adapter_config(directory: Path) -> AdapterConfig:
    """The config of the adapter in a directory.

    Raises:
        CheckpointError: the file is missing or invalid, or the adapter's type cannot be merged here.
    """
    file = directory / CONFIG
    raw = files.read_json(file)
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{file} does not contain a JSON object")
    kind, start = raw.get("peft_type"), raw.get("init_lora_weights")
    if kind not in KINDS:
        raise CheckpointError(f"{file}: peft_type is {kind!r}; this library merges {', '.join(KINDS)}. {_remedy()}")
    variants = [name for name in _VARIANTS if raw.get(name)]
    if variants:
        raise CheckpointError(f"{file} sets {', '.join(variants)}, which this library does not merge. {_remedy()}")
    if kind == "LORA" and start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, with which PEFT changes the base's weights too. {_remedy()}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(raw.get(name), Mapping | None):
            raise CheckpointError(f"{file}: {name} is {raw[name]!r}; it must map patterns to numbers")
    base, revision = raw.get("base_model_name_or_path") or None, raw.get("revision") or None
    for name, value in (("base_model_name_or_path", base), ("revision", revision)):
        if not isinstance(value, str | None):
            raise CheckpointError(f"{file}: {name} is {value!r}; it must be text")
    return AdapterConfig(file, kind, base, revision, raw)


def _remedy() -> str:
    return REMEDY[0].upper() + REMEDY[1:]


def _names(config: AdapterConfig, field: str) -> list[str] | str | None:
    """A field that is a list of names, a pattern, or absent."""
    value = config.raw.get(field)
    good = (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(x, str) for x in value))
    )
    if not good:
        raise CheckpointError(f"{config.file}: {field} is {value!r}; it must be text or a list of names")
    return [value] if isinstance(value, str) and field == "modules_to_save" else value


def _positive(config: AdapterConfig, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{config.file}: {name} is {value!r}; it must be a positive integer")
    return value


def _by_pattern(patterns: Settings | None, module: str, default: object) -> object:
    """The value of the first pattern that is the end of a module's name."""
    return next((value for key, value in (patterns or {}).items() if _matches(rf"(.*\.)?({key})$", module)), default)


def _is_named(module: str, names: list[str] | str) -> bool:
    """Whether a pattern is the whole name of a module, or one of several names is its end."""
    if isinstance(names, str):
        return _matches(rf"(?:{names})\Z", module) is not None
    return any(_ends_with(module, name) for name in names)


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _matches(pattern: str, text: str) -> regex.Match[str] | None:
    """As `re.match`, but a pattern that backtracks without end, which a hostile config may have, is an error."""
    try:
        return regex.match(pattern, text, timeout=_SECONDS)
    except regex.error as error:
        raise CheckpointError(
            f"the adapter's config has the pattern {pattern!r}, which is not valid: {error}"
        ) from None
    except TimeoutError:
        raise CheckpointError(
            f"the adapter's config has the pattern {pattern!r}, which takes more than {_SECONDS} s to match {text!r}"
        ) from None
