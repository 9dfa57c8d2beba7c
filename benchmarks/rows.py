"""The rows and figures that a benchmark reports, and its settings."""

import dataclasses
from typing import Any

from gemma3_jax import Gemma3Config


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run of the benchmarks.

    Attributes:
        size: a published size, or "quick": three narrow layers and short inputs, to check that everything runs.
        dtypes: of the parameters.
        rounds: interleaved turns of each measurement.
    """

    size: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rounds: int = 5

    @property
    def quick(self) -> bool:
        """Whether the run only checks that everything runs."""
        return self.size == "quick"

    @property
    def config(self) -> Gemma3Config:
        """The model's shape."""
        return narrow(3) if self.quick else Gemma3Config.preset(self.size)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number with its goal.

    Attributes:
        name: its label on the page.
        value: a fraction or a ratio; seconds if the name says so.
        goal: the value to reach, or None.
        at_least: whether more is better.
        percent: whether to show it as a percentage.
    """

    name: str
    value: float
    goal: float | None = None
    at_least: bool = True
    percent: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def as_dict(self) -> dict[str, Any]:
        """The figure for JSON, with `met`."""
        return dataclasses.asdict(self) | {"met": self.met}


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        case: the workload.
        dtype: of the parameters.
        seconds: median seconds of each peer; the port is "port".
        figures: the numbers computed from `seconds`.
        flops: floating-point operations of the port's run; 0 if they do not bound it.
        bytes: the fewest bytes that the port's run must read from memory; 0 if they do not bound it.
        share_goal: goal for the share of the memory bandwidth that the port reaches, or None.
    """

    case: str
    dtype: str
    seconds: dict[str, float]
    figures: tuple[Figure, ...] = ()
    flops: float = 0
    bytes: float = 0
    share_goal: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row for JSON, with `met` in each figure."""
        return dataclasses.asdict(self) | {"figures": [figure.as_dict() for figure in self.figures]}


def ratio(seconds: dict[str, float], goal: float | None = None) -> Figure:
    """The best peer's seconds over the port's."""
    peers = [value for name, value in seconds.items() if not name.startswith("port")]
    return Figure("best peer / port", min(peers) / seconds["port"], goal)


def added(name: str, seconds: float, plain: float, goal: float | None = None) -> Figure:
    """The relative time that something adds: seconds / plain - 1."""
    return Figure(name, seconds / plain - 1, goal, at_least=False, percent=True)


def narrow(layers: int) -> Gemma3Config:
    """A narrow model of that depth with the published pattern of layer types."""
    return dataclasses.replace(
        Gemma3Config.preset("270m"),
        num_hidden_layers=layers,
        layer_types=(),
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=32,
    )


def forward_flops(config: Gemma3Config, b: int, p: int, logits: int | None = None) -> float:
    """Multiplications and additions of a forward pass: 2 for each weight and token, 4 for each feature of each pair.

    `logits` is the number of positions with logits, by default all. A local layer has only the pairs in its window.
    """
    c = config
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    weights = c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)
    pairs = {
        "full_attention": p * (p + 1) / 2,
        "sliding_attention": sum(min(i + 1, c.sliding_window) for i in range(p)),
    }
    attention = sum(4 * pairs[kind] * c.num_attention_heads * c.head_dim for kind in c.layer_types)
    head = 2 * c.hidden_size * c.vocab_size * (p if logits is None else logits)
    return b * (2 * p * weights * c.num_hidden_layers + attention + head)
