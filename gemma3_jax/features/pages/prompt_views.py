"""Which features are active on which token of a prompt: as data, and as a page on which it is sorted.

Axes: p position, k largest features of a token.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma3_jax import atomic
from gemma3_jax.descriptions import Described, Description
from gemma3_jax.features.dictionaries import check_k
from gemma3_jax.features.encoding import Encode
from gemma3_jax.features.pages.neuronpedia import url_of
from gemma3_jax.features.pages.page import Labels, name_of, rendered, running
from gemma3_jax.features.parts import LAYERED, Feature, reader_of
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.features.searches.found import spelled
from gemma3_jax.harvest.documents import bos_of
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.pictures.labels import visible
from gemma3_jax.pictures.scale import Scale
from gemma3_jax.sites.names import layer_of

_COLOURS = 32
_SHOWN = 10  # rows of a description


class Active(NamedTuple):
    """A feature that is active on a token.

    Attributes:
        value: of the feature.
        feature: its index; in a dictionary of several layers, its layer and its index.
        position: of the token in the prompt.
        token: the token as a string.
    """

    value: float
    feature: Feature
    position: int
    token: str


@dataclasses.dataclass(frozen=True, repr=False)
class PromptView(Described):
    """What `features.prompt_view` returns. In a notebook it shows the largest values; `save` writes the page.

    Attributes:
        tokens: [p], the tokens of the prompt as strings.
        counts: [p] bool, which of them are looked at: neither BOS nor padding.
        rows: all active features of these, the largest value first.
        labels: by feature, a text that says what it is.
        title: of the page.
    """

    tokens: list[str]
    counts: np.ndarray
    rows: list[Active]
    labels: Labels
    title: str
    _dictionary: Dictionary

    def on(self, position: int) -> list[Active]:
        """The active features of a token, the largest value first; a negative position counts from the end."""
        position = range(len(self.tokens))[position]
        return [row for row in self.rows if row.position == position]

    def of(self, feature: Feature) -> np.ndarray:
        """The values [p] float32 of a feature in the prompt; 0 where it is not active, or not among the k largest."""
        values = np.zeros(len(self.tokens), np.float32)
        for row in self.rows:
            if row.feature == feature:
                values[row.position] = row.value
        return values

    def to_html(self) -> str:
        """The page: the prompt, and a table that is sorted by value, feature or token, and searched. No network."""
        features = sorted({row.feature for row in self.rows})
        at = {feature: i for i, feature in enumerate(features)}
        scale = Scale("value", 0, 1)
        data = {
            "tokens": [visible(token) for token in self.tokens],
            "features": [
                {
                    "name": name_of(each),
                    "label": self.labels.get(each, ""),
                    "link": url_of(self._dictionary, each),
                }
                for each in features
            ],
            "rows": [[row.position, at[row.feature], float(f"{row.value:.6g}")] for row in self.rows],
            "colours": [[scale.colour(x), scale.ink(x)] for x in np.linspace(0, 1, _COLOURS).tolist()],
            "labelled": bool(self.labels),
        }
        pairs = zip(map(running, self.tokens), self.counts.tolist(), strict=True)
        tokens = [{"text": text, "counts": counts} for text, counts in pairs]
        return rendered(
            "prompt.html",
            self.title,
            tokens=tokens,
            labelled=data["labelled"],
            data=data,
            description=self._description().title,
        )

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the page to a file that ends in .html, whole or not at all.

        Raises:
            ValueError: another suffix.
            OSError: the file cannot be written: see `gemma3_jax.atomic.new_file`.
        """
        path = Path(file)
        if path.suffix.lower() != ".html":
            raise ValueError(f"{path.name}: a view of a prompt is saved as .html")
        target = atomic.check_new_file(path)
        content = self.to_html()
        with atomic.new_file(target) as temporary:
            temporary.write_text(content, "utf-8")

    def _description(self) -> Description:
        features, site = len({row.feature for row in self.rows}), self._dictionary.site_in
        where = site if isinstance(site, str) else f"{site[0]} to {site[-1]}"
        title = f"{features:,} features on {int(self.counts.sum())} tokens, at {where}"
        rows = [
            (f"{value:.4g}", name_of(feature), f"{position} {token!r}", self.labels.get(feature, ""))
            for value, feature, position, token in self.rows[:_SHOWN]
        ]
        return Description(title, tuple(rows))


def prompt_view(
    model: HookedGemma3,
    sae: Dictionary,
    prompt: Input,
    k: int = 64,
    *,
    labels: Labels | None = None,
    title: str = "Features of a prompt",
) -> PromptView:
    """Find which features are active on which token of a prompt.

    BOS is shown and left out, since its features are many times as large as those of other tokens.

    Args:
        model: the model, which runs up to the last site of the dictionary.
        sae: a dictionary of any kind; of several layers, features are (layer, index).
        prompt: one text, one row of token ids, or the messages of one conversation.
        k: so many of the largest features of each token at most, in each layer.
        labels: by feature, a text that says what it is.
        title: of the page.

    Returns:
        A `PromptView`: .rows, .on(position), .of(feature), and .save("view.html").

    Raises:
        ValueError: k is below 1; there are several prompts; the site has another size; or a label is of no feature.
        UnknownSite: the model does not have a site of the dictionary.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import TINY, HookedGemma3, features
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> one = jnp.eye(model.config.hidden_size)
    >>> sae = features.SparseAutoencoder(
    ...     W_enc=one, b_enc=0 * one[0], W_dec=one, b_dec=0 * one[0], activation=features.Relu(),
    ...     site_in="blocks.1.hook_out",
    ... )
    >>> view = features.prompt_view(model, sae, "ba ke lo", k=2)
    >>> view.tokens, len(view.rows), [row.token for row in view.on(-1)]
    (['<bos>', 'ba', 'ke', 'lo'], 6, ['lo', 'lo'])
    """
    k = min(k, sae.width)
    check_k(k, sae.width)
    for each in labels or {}:
        reader_of(sae, each)
    reading: Any = {sae.site_in: Encode(sae, k)}
    _, cache = model.run_with_cache(prompt, reading, return_type=None)
    # [b, p]
    given = np.asarray(cache.tokens)
    if len(given) > 1:
        raise ValueError(f"there are {len(given)} prompts; give one")
    (ids,) = given
    counts = ids != bos_of(model)
    if cache.attention_mask is not None:
        counts &= np.asarray(cache.attention_mask)[0] > 0
    tokens = spelled(model, ids)
    rows: list[Active] = []
    for name in (sae.site_in,) if isinstance(sae.site_in, str) else sae.site_in:
        found: Any = cache[name]
        # [p, k]
        values, indices = np.asarray(found.values[0]), np.asarray(found.indices[0])
        layer = layer_of(name) if isinstance(sae, LAYERED) else None
        for position, rank in np.argwhere((values != 0) & counts[:, None]).tolist():
            index = int(indices[position, rank])
            feature: Feature = index if layer is None else (layer, index)
            rows.append(Active(float(values[position, rank]), feature, position, tokens[position]))
    rows.sort(key=lambda row: (-row.value, row.position, row.feature))
    return PromptView(tokens, counts, rows, dict(labels or {}), title, sae)
