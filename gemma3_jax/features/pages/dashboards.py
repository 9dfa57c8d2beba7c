"""Dashboards: a web page for each feature of a search, and an index. They work from a folder, without a network.

Axes: d features of a site, f features of the dictionary, w tokens of a window.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gemma3_jax import atomic
from gemma3_jax.compute.matmul import matmul
from gemma3_jax.features.activations import JumpRelu
from gemma3_jax.features.pages.page import Labels, bars, coloured, file_of, name_of, number, rendered
from gemma3_jax.features.parts import LAYERED, Feature, restricted_to
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.features.searches.found import Found, FoundFeature
from gemma3_jax.pictures.scale import fitting_scale
from gemma3_jax.sites.names import layer_of

_LOGITS = 10  # tokens of a page that are raised, and that are lowered
_WORDS = 8  # tokens in a cell of the index
_BESIDE = 6


def dashboard(
    found: Found,
    directory: str | os.PathLike[str],
    features: Sequence[Feature] | np.ndarray | None = None,
    *,
    labels: Labels | None = None,
    title: str = "Features",
    progress: bool | None = None,
) -> Path:
    """Write a web page for each feature of a search, and an index in which numbers, tokens and labels are searched.

    A page has the texts where the feature is largest, each token on the colour of its value; how often it is active; a
    histogram of its values; the logits that it raises and lowers; facts of its weights and the features with similar
    decoder rows; and a link to Neuronpedia where the dictionary was loaded with an id there. Pages are some tens of kB,
    and have all that they need: they work without a network. Values in texts come from a run for each feature.

    Args:
        found: the result of `search`.
        directory: a directory that does not exist yet, or is empty; it is written whole or not at all.
        features: which of those that were searched; None for all of them.
        labels: by feature, a text that says what it is.
        title: of the index.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        The path of the index.

    Raises:
        ValueError: a feature, or one that has a label, is not in the dictionary; or features is empty.
        KeyError: a feature was not searched.
        OSError: the directory cannot be written: see `gemma3_jax.atomic.new_directory`.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from gemma3_jax import TINY, HookedGemma3, features
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> one = jnp.eye(model.config.hidden_size)
    >>> sae = features.SparseAutoencoder(
    ...     W_enc=one, b_enc=-one[0], W_dec=one, b_dec=0 * one[0], activation=features.Relu(),
    ...     site_in="blocks.1.hook_out",
    ... )
    >>> found = features.search(model, sae, ["ba ke lo mu", "ti so"], k=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     index = features.dashboard(found, f"{folder}/pages", [7, 9], labels={7: "syllables"})
    ...     sorted(file.name for file in index.parent.iterdir())
    ['7.html', '9.html', 'index.html']
    """
    target = atomic.check_new_directory(directory)
    named = list(found) if features is None else [found[each] for each in features]
    if not named:
        raise ValueError("features is empty; name some, or leave it out for all that were searched")
    chosen = sorted({each.feature: each for each in named}.values(), key=lambda each: each.feature)
    known = {found[each].feature: text for each, text in (labels or {}).items()}
    names = [each.feature for each in chosen]
    rows = []
    with atomic.new_directory(target) as folder:
        for number, each in enumerate(tqdm(chosen, unit=" pages", disable=None if progress is None else not progress)):
            beside = [names[i] if 0 <= i < len(names) else None for i in (number - 1, number + 1)]
            (folder / file_of(each.feature)).write_text(_page(found, each, beside, known, set(names)), "utf-8")
            rows.append(_row(each, known))
        index = rendered(
            "index.html", title, rows=rows, labelled=bool(known), description=repr(found).partition("\n")[0]
        )
        (folder / "index.html").write_text(index, "utf-8")
    return target / "index.html"


def _page(found: Found, own: FoundFeature, beside: list[Feature | None], labels: Labels, pages: set[Feature]) -> str:
    """The page of a feature, between two others."""
    counts, edges = own.histogram
    before, after = (each if each is None else _linked(each, pages) for each in beside)
    try:
        top, bottom, no_logits = own.top_logits[:_LOGITS], own.bottom_logits[:_LOGITS], ""
    except ValueError as error:
        top, bottom, no_logits = [], [], str(error)
    return rendered(
        "feature.html",
        f"Feature {name_of(own.feature)}",
        name=name_of(own.feature),
        label=labels.get(own.feature),
        before=before,
        after=after,
        link=own.neuronpedia,
        facts=_facts(own, found.dictionary),
        bars=bars(counts, edges),
        end=number(edges[-1]),
        similar=_similar(own.feature, found.dictionary, pages),
        coactive=_coactive(found, own.feature, pages),
        examples=_examples(own),
        top=top,
        bottom=bottom,
        no_logits=no_logits,
    )


def _row(own: FoundFeature, labels: Labels) -> dict[str, object]:
    """What the index says of a feature."""
    try:
        logits = [token for token, _ in own.top_logits[:_WORDS]]
    except ValueError:  # without a direct path
        logits = []
    return {
        "name": name_of(own.feature),
        "file": file_of(own.feature),
        "label": labels.get(own.feature, ""),
        "frequency": own.frequency,
        "largest": own.largest,
        "tokens": list(dict.fromkeys(each.token for each in own.examples))[:_WORDS],
        "logits": logits,
    }


def _examples(own: FoundFeature) -> list[dict[str, object]]:
    """The texts of a feature, on one scale."""
    activations = own.activations
    scale = fitting_scale("value", np.concatenate([np.zeros(1), *activations]))
    return [
        {
            "value": each.value,
            "document": each.document,
            "offset": each.offset,
            "tokens": coloured(each.tokens, values, scale, each.at),
        }
        for each, values in zip(own.examples, activations, strict=True)
    ]


def _facts(own: FoundFeature, sae: Dictionary) -> list[tuple[str, str]]:
    """Names and texts: of its values, of its sites and of its weights."""
    layer, index = own.feature if isinstance(own.feature, tuple) else (None, own.feature)
    facts = [
        ("active on", f"{own.frequency:.4%} of {own.tokens:,} tokens: {own.count:,}"),
        ("largest value", number(own.largest)),
    ]
    if isinstance(sae, LAYERED):
        i = [layer_of(name) for name in sae.site_in].index(layer)
        row = np.asarray(sae.W_dec[i][index], np.float32)
        facts += [("reads", sae.site_in[i]), ("writes", f"{len(row)} layers")]
        facts += [("decoder", f"length {number(float(np.linalg.norm(row)))}, of all layers together")]
        return facts
    facts += [("reads", sae.site_in), ("writes", sae.site_out)]
    one = restricted_to(sae, jnp.asarray([index]))
    encoder, decoder = np.asarray(one.W_enc, np.float32)[:, 0], np.asarray(one.W_dec, np.float32)[0]
    lengths = np.linalg.norm(encoder), np.linalg.norm(decoder)
    facts.append(("encoder", f"length {lengths[0]:.4g}, bias {float(one.b_enc[0]):.4g}"))
    if isinstance(one.activation, JumpRelu):
        facts.append(("threshold", f"{float(np.ravel(one.activation.threshold)[0]):.4g}"))
    cosine = ""
    if encoder.shape == decoder.shape and min(lengths) > 0:
        cosine = f", cosine with the encoder {encoder @ decoder / lengths[0] / lengths[1]:.3f}"
    return [*facts, ("decoder", f"length {lengths[1]:.4g}{cosine}")]


def _similar(feature: Feature, sae: Dictionary, pages: set[Feature]) -> list[dict[str, object]]:
    """The features with the most similar decoder rows; none in a dictionary of several layers."""
    if isinstance(sae, LAYERED) or sae.width == 1:
        return []
    cosines, indices = jax.device_get(_nearest(sae.W_dec, feature, min(_BESIDE, sae.width - 1)))
    return [
        {**_linked(index, pages), "cosine": cosine}
        for index, cosine in zip(indices.tolist(), cosines.tolist(), strict=True)
    ]


def _coactive(found: Found, feature: Feature, pages: set[Feature]) -> list[dict[str, object]]:
    """The features that are most often active on the same tokens; none if they were not counted."""
    with contextlib.suppress(KeyError):
        return [
            {**_linked(each, pages), "jaccard": jaccard, "tokens": tokens}
            for each, tokens, jaccard in found.coactive(feature, _BESIDE)
        ]
    return []


def _linked(feature: Feature, pages: set[Feature]) -> dict[str, str]:
    """The name of a feature, and its page if it has one."""
    return {"name": name_of(feature), "file": file_of(feature) if feature in pages else ""}


@functools.partial(jax.jit, static_argnums=2)
def _nearest(W_dec: jax.Array, feature: Feature, k: int) -> tuple[jax.Array, jax.Array]:
    """The cosines [k] of the rows of W_dec [f, d] that are nearest to that of a feature, and their indices [k]."""
    rows = W_dec.astype(jnp.float32)
    # [f, d] x [d] -> [f]
    products = matmul("fd,d->f", rows, rows[feature])
    lengths = jnp.linalg.norm(rows, axis=1)
    cosines = products / jnp.maximum(lengths * lengths[feature], 1e-30)
    return jax.lax.top_k(cosines.at[feature].set(-jnp.inf), k)
