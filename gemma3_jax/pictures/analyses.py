"""The picture of each analysis, from its arrays."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from gemma3_jax.config import Gemma3Config
from gemma3_jax.grids import Grid
from gemma3_jax.pictures.data import Axis, Panel
from gemma3_jax.pictures.heatmaps import Heatmaps
from gemma3_jax.pictures.labels import check_index, layer_labels, shortened, token_labels, visible
from gemma3_jax.pictures.numbers import check_shape, numbers
from gemma3_jax.pictures.scale import fitting_scale

Value = TypeVar("Value")

_POSITIONS = ("position", "pos", "query", "key", "src_pos")


def attention_patterns(
    patterns: ArrayLike,
    tokens: Sequence[str],
    heads: Sequence[tuple[int, int]],
    config: Gemma3Config,
    *,
    title: str = "Attention patterns",
    vmin: float = 0.0,
    vmax: float = 1.0,
) -> Heatmaps:
    """A panel for each head, with queries as rows and keys as columns. White is attention `vmin`, dark blue is `vmax`.

    Args:
        patterns: [n, p, k], n heads of one prompt, as in `blocks.*.attn.hook_pattern`; p and k are equal.
        tokens: [p], as `HookedGemma3.to_str_tokens` returns them.
        heads: [n], the layer and head of each pattern.
        config: the model's config; it tells local layers from global ones.
        vmin: the lowest attention with a colour of its own.
        vmax: the highest; less than 1 shows what is beside <bos>, which gets most of the attention of many heads.

    Raises:
        ValueError: the shapes do not match, the model has no such layer or head, a value is outside 0 to 1, or vmin is
            not below vmax.

    >>> from gemma3_jax import TINY, HookedGemma3, pictures
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> _, cache = model.run_with_cache("ba ke lo ba", ["blocks.1.attn.hook_pattern"])
    >>> patterns = cache["blocks.1.attn.hook_pattern"][0, :2]
    >>> tokens = model.to_str_tokens("ba ke lo ba")
    >>> picture = pictures.attention_patterns(patterns, tokens, [(1, 0), (1, 1)], model.config)
    >>> picture.panels[1].title
    'layer 1 global, head 1'
    """
    values = numbers(patterns)
    n, p = len(heads), len(tokens)
    check_shape("patterns", values.shape, (n, p, p), f"{n} heads and {p} tokens")
    _check_probabilities("patterns", patterns, "; patching_heatmap draws others, with axes='head query key'")
    for _, head in heads:
        check_index("head", head, config.num_attention_heads)
    layers = layer_labels(config, (layer for layer, _ in heads))
    titles = [f"layer {layer}, head {head}" for layer, (_, head) in zip(layers, heads, strict=True)]
    panels = [Panel(*each) for each in zip(titles, values, strict=True)]
    labels = token_labels(tokens)
    return Heatmaps(
        title, panels, Axis("query", labels), Axis("key", labels), fitting_scale("attention", values, vmin, vmax)
    )


def patching_heatmap(
    values: ArrayLike,
    config: Gemma3Config | None = None,
    tokens: Sequence[str] | None = None,
    *,
    axes: str | Sequence[str] | None = None,
    labels: Mapping[str, Sequence[int | str]] | None = None,
    names: Mapping[str, str] | None = None,
    title: str | None = None,
    quantity: str = "effect",
    vmin: float | None = None,
    vmax: float | None = None,
) -> Heatmaps:
    """The effect of a patch, an ablation or an attribution by layer, position, head...: red < 0, white 0, blue > 0.

    The last two axes are the rows and columns of a panel. If there are more axes, each index of them has a panel. Cells
    that are not finite, such as unfinished runs of a sweep, are grey.

    Args:
        values: [...], one axis for each name in `axes`. The result of a sweep or of patching has its own config,
            tokens, axes and title, which the other arguments replace.
        config: the model's config; it tells local layers from global ones.
        tokens: [p], the labels of positions, queries and keys; with None, these are numbered.
        axes: names of the axes, in a tuple or separated by spaces: layer, head, position (or pos, query, key, src_pos),
            or a name that `labels` has; by default "layer position".
        labels: labels for axes that do not have all layers, heads or tokens. A number is an index of a layer, head or
            token, and a string is a label: `{"layer": [4, 5], "site": ["resid_pre", "attn_out", "mlp_out"]}`.
        names: names of axes in the picture, where they are not those of `axes`: `{"position": "corrupted token"}`.
        title: by default "Activation patching".
        quantity: name of the values, for the colour bar.
        vmin: the lowest value with a colour of its own; None: the negative of the largest magnitude, or 0 if no value
            is negative.
        vmax: the highest value with a colour of its own.

    Raises:
        ValueError: the shapes, axes and labels do not match, or vmin is not below vmax.

    >>> import numpy as np
    >>> from gemma3_jax import Gemma3Config, pictures
    >>> effects = np.zeros((26, 3))
    >>> pictures.patching_heatmap(effects, Gemma3Config.preset("1b"), ["<bos>", "ba", "ke"]).rows.labels[5]
    '5 global'
    >>> pictures.patching_heatmap(effects, Gemma3Config.preset("1b"), ["<bos>", "ba"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: values have 3 entries along axis 'position', which has 2 labels; ...
    """
    if isinstance(values, Grid) and values.axes:
        tokens = values.tokens if tokens is None else tokens
        labels = {**values.labels, **(labels or {})} if axes is None else labels
        config, axes, title = config or values.config, axes or values.axes, title or values.what
    if config is None:
        raise ValueError("the values do not say what model they are of; pass model.config")
    axes, title = axes or "layer position", title or "Activation patching"
    every = axes.split() if isinstance(axes, str) else list(axes)
    array, labels, shown = numbers(values), _as_in(every, labels), _as_in(every, names)
    if len(every) != array.ndim or len(every) < 2:
        raise ValueError(
            f"values have shape {array.shape}, but axes {axes!r} names {len(every)}; name each axis, and at least two"
        )
    for argument, mapping in (("labels", labels), ("names", shown)):
        if stray := sorted(set(mapping) - set(every)):
            raise ValueError(
                f"{argument} has {', '.join(stray)}, which axes {axes!r} does not have; add it or drop its {argument}"
            )
    named = [
        Axis(shown.get(name, name), _axis_labels(name, size, config, tokens, labels.get(name)))
        for name, size in zip(every, array.shape, strict=True)
    ]
    *outer, rows, columns = named
    titles = [
        ", ".join(f"{axis.name} {label}" for axis, label in zip(outer, index, strict=True))
        for index in itertools.product(*(axis.labels for axis in outer))
    ]
    # [..., r, c] -> [n, r, c]
    panels = [Panel(*each) for each in zip(titles, array.reshape(-1, *array.shape[-2:]), strict=True)]
    return Heatmaps(title, panels, rows, columns, fitting_scale(quantity, array, vmin, vmax))


def _as_in(axes: Sequence[str], mapping: Mapping[str, Value] | None) -> dict[str, Value]:
    """A mapping by axes; results of patching say "pos" for what pictures call "position"."""
    known = {"position": "pos"} if "pos" in axes and "position" not in axes else {}
    return {known.get(name, name): value for name, value in (mapping or {}).items()}


def logit_lens_table(
    top_tokens: Sequence[Sequence[str]] | Sequence[Sequence[Sequence[str]]],
    probabilities: ArrayLike,
    tokens: Sequence[str],
    config: Gemma3Config,
    *,
    layers: Sequence[int | str] | None = None,
    title: str = "Logit lens",
    vmin: float = 0.0,
    vmax: float = 1.0,
) -> Heatmaps:
    """The model's prediction after each layer (row) at each position (column) (nostalgebraist, 2020).

    Each cell has the likeliest token on the colour of its probability: white is `vmin`, dark blue is `vmax`. In HTML,
    hovering over a cell shows all its k tokens.

    Args:
        top_tokens: [r, p] or [r, p, k], the likeliest first.
        probabilities: the probabilities of `top_tokens`, of the same shape.
        tokens: [p], the tokens of the prompt.
        config: the model's config; it tells local layers from global ones.
        layers: [r], the rows: layer indices, and strings for rows that are not layers, such as "embed". None: all
            layers.
        vmin: the lowest probability with a colour of its own.
        vmax: the highest.

    Raises:
        ValueError: the shapes do not match, the model has no such layer, a value is outside 0 to 1, or vmin is not
            below vmax.

    >>> from gemma3_jax import Gemma3Config, pictures
    >>> config = Gemma3Config.preset("270m")
    >>> table = pictures.logit_lens_table([["mu", "ti"]], [[0.9, 0.5]], ["ba", "ke"], config, layers=[17])
    >>> table.panels[0].texts, table.rows.labels
    ([['mu', 'ti']], ['17 global'])
    """
    rows = Axis("layer", layer_labels(config, layers))
    words, values = np.array(top_tokens, dtype=object), numbers(probabilities)
    k = words.shape[2:3]
    expected = (len(rows.labels), len(tokens), *k)
    for name, shape in (("top_tokens", words.shape), ("probabilities", values.shape)):
        check_shape(name, shape, expected, f"{len(rows.labels)} layers and {len(tokens)} tokens")
    _check_probabilities("probabilities", probabilities)
    # [r, p] or [r, p, k] -> [r, p, k]
    words, values = words.reshape(*expected[:2], -1), values.reshape(*expected[:2], -1)
    texts = [[shortened(visible(cell[0])) for cell in row] for row in words]
    details = [[_ranking(*cell) for cell in zip(*row, strict=True)] for row in zip(words, values, strict=True)]
    panel = Panel("", values[:, :, 0], texts, details)
    scale = fitting_scale("probability", values[:, :, 0], vmin, vmax)
    return Heatmaps(title, [panel], rows, Axis("position", token_labels(tokens)), scale)


def _axis_labels(
    name: str,
    size: int,
    config: Gemma3Config,
    tokens: Sequence[str] | None,
    chosen: Sequence[int | str] | None,
) -> list[str]:
    """The labels of an axis: all of them, or the chosen ones. A number is an index of a label; a string is a label."""
    every = _every_label(name, config, tokens)
    if chosen is not None:
        labels = [item if isinstance(item, str) else _pick(name, every, item) for item in chosen]
    elif every is not None:
        labels = every[:size] if name == "head" and size == config.num_key_value_heads else every
    elif name in _POSITIONS:
        labels = [str(position) for position in range(size)]
    else:
        raise ValueError(
            f"axis {name!r} is not one of layer, head, {', '.join(_POSITIONS)}; pass labels={{{name!r}: [...]}}"
        )
    if len(labels) != size:
        raise ValueError(
            f"values have {size} entries along axis {name!r}, which has {len(labels)} labels; "
            f"pass labels={{{name!r}: [...]}} to set them"
        )
    return labels


def _every_label(name: str, config: Gemma3Config, tokens: Sequence[str] | None) -> list[str] | None:
    """The labels that the model or the prompt gives an axis, or None."""
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


def _check_probabilities(name: str, values: ArrayLike, remedy: str = "") -> None:
    array = np.asarray(values, np.float32)
    if np.any((array < 0) | (array > 1 + 1e-3)):
        low, high = np.nanmin(array), np.nanmax(array)
        raise ValueError(f"{name} range from {low:.3g} to {high:.3g}; probabilities must be between 0 and 1{remedy}")
