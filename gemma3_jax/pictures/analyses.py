"""The pictures of each analysis, from its arrays to what is drawn."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from gemma3_jax.config import Gemma3Config
from gemma3_jax.pictures.heatmaps import Axis, Heatmaps, Panel
from gemma3_jax.pictures.labels import check_index, check_tokens, layer_labels, shortened, token_labels, visible
from gemma3_jax.pictures.scale import fitting_scale, probability_scale, signed_scale
from gemma3_jax.pictures.token_flow import TokenFlow

_POSITIONS = ("position", "pos", "query", "key", "src_pos")


def attention_patterns(
    patterns: ArrayLike,
    tokens: Sequence[str],
    heads: Sequence[tuple[int, int]],
    config: Gemma3Config,
    *,
    title: str = "Attention patterns",
) -> Heatmaps:
    """A panel for each head: how much each query, a row, attends to each key, a column; white is 0, dark blue 1.

    Args:
        patterns: [n, p, k], n heads of one prompt, as `blocks.*.attn.hook_pattern` holds them; p and k are equal.
        tokens: [p], as `HookedGemma3.to_str_tokens` gives them.
        heads: [n], the layer and head of each pattern.
        config: the model's; says which layers are local.

    Raises:
        ValueError: shapes that do not fit each other, a layer or head that the model lacks, values outside 0 to 1.

    >>> from gemma3_jax import TINY, HookedGemma3, pictures
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> _, cache = model.run_with_cache("ba ke lo ba", ["blocks.1.attn.hook_pattern"])
    >>> patterns = cache["blocks.1.attn.hook_pattern"][0, :2]
    >>> tokens = model.to_str_tokens("ba ke lo ba")
    >>> picture = pictures.attention_patterns(patterns, tokens, [(1, 0), (1, 1)], model.config)
    >>> picture.panels[1].title
    'layer 1 global, head 1'
    """
    values = _numbers(patterns)
    n, p = len(heads), len(tokens)
    _check_shape("patterns", values.shape, (n, p, p), f"{n} heads and {p} tokens")
    _check_probabilities("patterns", patterns, "; patching_heatmap draws others, with axes='head query key'")
    for _, head in heads:
        check_index("head", head, config.num_attention_heads)
    layers = layer_labels(config, (layer for layer, _ in heads))
    titles = [f"layer {layer}, head {head}" for layer, (_, head) in zip(layers, heads, strict=True)]
    panels = [Panel(*each) for each in zip(titles, values, strict=True)]
    labels = token_labels(tokens)
    return Heatmaps(title, panels, Axis("query", labels), Axis("key", labels), probability_scale("attention"))


def patching_heatmap(
    values: ArrayLike,
    config: Gemma3Config,
    tokens: Sequence[str] | None = None,
    *,
    axes: str | Sequence[str] = "layer position",
    labels: Mapping[str, Sequence[int | str]] | None = None,
    title: str = "Activation patching",
    quantity: str = "effect",
) -> Heatmaps:
    """What a patch, an ablation or an attribution did, by layer and position, by head...: red < 0, white 0, blue > 0.

    The last two axes are the rows and columns of a panel; where there are more, each index of the others has a panel.
    Cells that are not finite, such as those that an unfinished sweep has not come to, are grey.

    Args:
        values: [...], one axis for each name in `axes`.
        config: the model's; says which layers are local.
        tokens: [p], the labels of positions, queries and keys; None numbers them.
        axes: their names, in a tuple or separated by spaces: layer, head, position (or pos, query, key, src_pos), or
            any other that `labels` has.
        labels: what stands along an axis where that is not all layers, heads or tokens. Numbers pick of these, and
            strings stand for themselves: `{"layer": [4, 5], "site": ["resid_pre", "attn_out", "mlp_out"]}`.
        quantity: what the values are, for the colour bar.

    Raises:
        ValueError: shapes, axes and labels that do not fit each other.

    >>> import numpy as np
    >>> from gemma3_jax import Gemma3Config, pictures
    >>> effects = np.zeros((26, 3))
    >>> pictures.patching_heatmap(effects, Gemma3Config.preset("1b"), ["<bos>", "ba", "ke"]).rows.labels[5]
    '5 global'
    >>> pictures.patching_heatmap(effects, Gemma3Config.preset("1b"), ["<bos>", "ba"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: values have 3 entries along axis 'position', which has 2 labels; ...
    """
    array, labels = _numbers(values), dict(labels or {})
    names = axes.split() if isinstance(axes, str) else list(axes)
    if len(names) != array.ndim or len(names) < 2:
        raise ValueError(
            f"values have shape {array.shape}, and axes {axes!r} are {len(names)}; name each axis, and at least two"
        )
    stray = sorted(set(labels) - set(names))
    if stray:
        raise ValueError(f"labels are for {', '.join(stray)}, which axes {axes!r} lacks")
    named = [
        Axis(name, _axis_labels(name, size, config, tokens, labels.get(name)))
        for name, size in zip(names, array.shape, strict=True)
    ]
    *outer, rows, columns = named
    titles = [
        ", ".join(f"{axis.name} {label}" for axis, label in zip(outer, index, strict=True))
        for index in itertools.product(*(axis.labels for axis in outer))
    ]
    # [..., r, c] -> [n, r, c]
    panels = [Panel(*each) for each in zip(titles, array.reshape(-1, *array.shape[-2:]), strict=True)]
    return Heatmaps(title, panels, rows, columns, signed_scale(quantity, array))


def logit_lens_table(
    top_tokens: Sequence[Sequence[str]] | Sequence[Sequence[Sequence[str]]],
    probabilities: ArrayLike,
    tokens: Sequence[str],
    config: Gemma3Config,
    *,
    layers: Sequence[int | str] | None = None,
    title: str = "Logit lens",
) -> Heatmaps:
    """What the model would predict after each layer, a row, at each position, a column (nostalgebraist, 2020).

    Each cell holds the likeliest token on the colour of its probability, white for 0 and dark blue for 1. The HTML
    tells all k tokens of a cell under the mouse.

    Args:
        top_tokens: [r, p] or [r, p, k], the likeliest first.
        probabilities: those of the tokens, of the same shape.
        tokens: [p], the prompt's.
        config: the model's; says which layers are local.
        layers: [r], the rows: numbers of layers, or a string for what is none, such as "embed". None: all layers.

    Raises:
        ValueError: shapes that do not fit each other, a layer that the model lacks, values outside 0 to 1.

    >>> from gemma3_jax import Gemma3Config, pictures
    >>> config = Gemma3Config.preset("270m")
    >>> table = pictures.logit_lens_table([["mu", "ti"]], [[0.9, 0.5]], ["ba", "ke"], config, layers=[17])
    >>> table.panels[0].texts, table.rows.labels
    ([['mu', 'ti']], ['17 global'])
    """
    rows = Axis("layer", layer_labels(config, layers))
    words, values = np.array(top_tokens, dtype=object), _numbers(probabilities)
    k = words.shape[2:3]
    expected = (len(rows.labels), len(tokens), *k)
    for name, shape in (("top_tokens", words.shape), ("probabilities", values.shape)):
        _check_shape(name, shape, expected, f"{len(rows.labels)} layers and {len(tokens)} tokens")
    _check_probabilities("probabilities", probabilities)
    # [r, p] or [r, p, k] -> [r, p, k]
    words, values = words.reshape(*expected[:2], -1), values.reshape(*expected[:2], -1)
    texts = [[shortened(visible(cell[0])) for cell in row] for row in words]
    details = [[_ranking(*cell) for cell in zip(*row, strict=True)] for row in zip(words, values, strict=True)]
    panel = Panel("", values[:, :, 0], texts, details)
    return Heatmaps(title, [panel], rows, Axis("position", token_labels(tokens)), probability_scale("probability"))


def token_values(
    tokens: Sequence[str], values: ArrayLike, *, title: str = "Values of tokens", quantity: str = "value"
) -> TokenFlow:
    """A text whose tokens are coloured by a value each: a loss, a feature's activation, an attribution.

    White is 0 and blue is above; where some value is negative, red is below. Values that are not finite are grey.

    Args:
        tokens: [p].
        values: [p].
        quantity: what the values are, for the colour bar.

    Raises:
        ValueError: there are not as many values as tokens.

    >>> from gemma3_jax import pictures
    >>> pictures.token_values(["ba", "ke"], [0.5, -1.0], title="Loss by token")
    TokenFlow('Loss by token')
    """
    array = _numbers(values)
    _check_shape("values", array.shape, (len(tokens),), f"{len(tokens)} tokens")
    return TokenFlow(title, check_tokens(tokens), array, fitting_scale(quantity, array))


def _axis_labels(
    name: str,
    size: int,
    config: Gemma3Config,
    tokens: Sequence[str] | None,
    chosen: Sequence[int | str] | None,
) -> list[str]:
    """Labels of an axis: all that there are, or the chosen, where numbers pick and strings stand for themselves."""
    every = _every_label(name, config, tokens)
    if chosen is not None:
        labels = [item if isinstance(item, str) else _pick(name, every, item) for item in chosen]
    elif every is not None:
        labels = every[:size] if name == "head" and size == config.num_key_value_heads else every
    elif name in _POSITIONS:
        labels = [str(position) for position in range(size)]
    else:
        raise ValueError(
            f"axis {name!r} is none of layer, head, {', '.join(_POSITIONS)}; labels={{{name!r}: [...]}} would name it"
        )
    if len(labels) != size:
        raise ValueError(
            f"values have {size} entries along axis {name!r}, which has {len(labels)} labels; "
            f"labels={{{name!r}: [...]}} sets them"
        )
    return labels


def _every_label(name: str, config: Gemma3Config, tokens: Sequence[str] | None) -> list[str] | None:
    """The labels that the model and the prompt give an axis; None where they give none."""
    if name == "layer":
        return layer_labels(config)
    if name == "head":
        return [str(head) for head in range(config.num_attention_heads)]
    return token_labels(tokens) if name in _POSITIONS and tokens is not None else None


def _pick(name: str, every: list[str] | None, item: int) -> str:
    if every is None:
        return str(item)
    check_index(name, item, len(every))
    return every[item]


def _ranking(words: np.ndarray, values: np.ndarray) -> str:
    return "\n".join(f"{visible(word)} {value:.3f}" for word, value in zip(words, values, strict=True))


def _numbers(values: ArrayLike) -> np.ndarray:
    """In float32, NaN where not finite."""
    array = np.asarray(values, np.float32)
    return np.where(np.isfinite(array), array, np.float32(np.nan))


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], reason: str) -> None:
    if shape != expected:
        raise ValueError(f"{name} has shape {shape}; {reason} need {expected}")


def _check_probabilities(name: str, values: ArrayLike, remedy: str = "") -> None:
    array = np.asarray(values, np.float32)
    if np.any((array < 0) | (array > 1 + 1e-3)):
        low, high = np.nanmin(array), np.nanmax(array)
        raise ValueError(f"{name} range from {low:.3g} to {high:.3g}, and probabilities lie in 0 to 1{remedy}")
