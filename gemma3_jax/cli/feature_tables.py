"""What `gemma3-jax features` prints: tables, and what JSON has of the same."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from gemma3_jax.messages import printable
from gemma3_jax.types import JsonObject

if TYPE_CHECKING:
    from gemma3_jax.features.checking import Report
    from gemma3_jax.features.parts import Feature
    from gemma3_jax.features.searches.found import Found, FoundFeature


def report_as_dict(report: "Report") -> JsonObject:
    """A report as JSON has it; a site that cannot be compared has null."""
    names = ("site", "fvu", "l0", "dead", "cosine", "delta_loss", "tokens")
    pairs = {name: dict(getattr(report, name)) for name in ("better", "neighbours")}
    finite = {name: {site: v if np.isfinite(v) else None for site, v in each.items()} for name, each in pairs.items()}
    return {name: getattr(report, name) for name in names} | finite


def report_table(report: "Report", dictionary: str) -> Table:
    """The figures of the site, and the FVU of each site beside it."""
    table = Table("site", "FVU", title=printable(dictionary))
    table.add_row(report.site, f"{report.fvu:.4f}")
    better = dict(report.better)
    for name, fvu in report.neighbours:
        size = f"{fvu:.4f}" if np.isfinite(fvu) else "another size"
        table.add_row(name, f"{size}, BETTER" if name in better else size)
    return table


def features_table(shown: Sequence["FoundFeature"]) -> Table:
    """One row for each feature."""
    table = Table("feature", "active on", "largest", "at the tokens", "raises")
    for each in shown:
        tokens = dict.fromkeys(example.token for example in each.examples)
        name = printable(each.feature).strip("()").replace(", ", "/")
        raised = [token for token, _ in _logits(each)["top_logits"]]
        table.add_row(name, f"{each.frequency:.3%}", f"{each.largest:.4g}", _words(tokens), _words(raised))
    return table


def _words(tokens: Iterable[str], most: int = 6) -> str:
    """The first tokens, in quotes."""
    return " ".join(printable(repr(token)) for token in list(tokens)[:most])


def examples_table(each: "FoundFeature") -> Table:
    """A feature with its examples."""
    table = Table("value", "text", "document", title=printable(repr(each).partition("\n")[0]))
    for one in each.examples:
        text = f"{one.before!r} [{one.token!r}] {one.after!r}"
        table.add_row(f"{one.value:.4g}", printable(text), str(one.document))
    logits = _logits(each)
    table.add_section()
    for name, pairs in logits.items():
        table.add_row(name.partition("_")[0], _words(dict(pairs), 10), "logits")
    return table


def _logits(each: "FoundFeature") -> Mapping[str, list[tuple[str, float]]]:
    """The tokens that a feature raises and lowers; none without a direct path."""
    try:
        return {"top_logits": each.top_logits, "bottom_logits": each.bottom_logits}
    except ValueError:
        return {"top_logits": [], "bottom_logits": []}


def _coactive(found: "Found", feature: "Feature") -> list[JsonObject]:
    """The features that are active on the same tokens, of those that were searched; none if they were not counted."""
    with contextlib.suppress(KeyError):
        return [each._asdict() for each in found.coactive(feature)]
    return []


def search_as_dict(found: "Found", shown: Sequence["FoundFeature"]) -> JsonObject:
    """What a search found, as JSON has it."""
    return {
        "tokens": found.tokens,
        "documents": found.documents,
        "features": [
            {
                "feature": each.feature,
                "count": each.count,
                "frequency": each.frequency,
                "largest": each.largest,
                "histogram": {"counts": each.histogram.counts.tolist(), "edges": each.histogram.edges.tolist()},
                "examples": [
                    {
                        "value": one.value,
                        "document": one.document,
                        "offset": one.offset,
                        "before": one.before,
                        "token": one.token,
                        "after": one.after,
                    }
                    for one in each.examples
                ],
                **_logits(each),
                "coactive": _coactive(found, each.feature),
                "neuronpedia": each.neuronpedia,
            }
            for each in shown
        ],
    }
