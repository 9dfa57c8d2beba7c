"""HTML pages of features: templates, and what of a token, a text or a feature a template shows.

Templates escape every text. Characters that reorder or hide a text are shown as escapes, as in pictures.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma3_jax.features.parts import Feature
from gemma3_jax.pictures.labels import printable, visible
from gemma3_jax.pictures.picture import page
from gemma3_jax.pictures.scale import Scale

if TYPE_CHECKING:
    import jinja2

# Texts by feature. Keys are not `Feature`, since `dict[int, str]` would not be such a mapping.
Labels = Mapping[Any, str]


@functools.cache
def _templates() -> "jinja2.Environment":
    import jinja2  # only where a page is made

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"visible": visible, "printable": printable, "number": number}
    return environment


def rendered(template: str, title: str, **values: object) -> str:
    """A whole HTML page from a template; it does not use the network."""
    return page(title, _templates().get_template(template).render(title=title, **values))


def name_of(feature: Feature) -> str:
    """A feature as text: 1234; or 9/1234, of a dictionary of several layers."""
    return "/".join(map(str, feature)) if isinstance(feature, tuple) else str(feature)


def file_of(feature: Feature) -> str:
    """The name of a feature's page."""
    return f"{name_of(feature).replace('/', '-')}.html"


def number(value: float) -> str:
    """A number with four digits, or those before the point if they are more.

    >>> number(0.012345), number(17320.4)
    ('0.01235', '17,320')
    """
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:,.0f}"


def running(token: str) -> str:
    r"""A token as it is shown in running text: as `visible`, with its spaces.

    >>> running(" a\n"), running("\u202e")
    (' a↵', '\\u202e')
    """
    return " ".join(visible(part) if part else "" for part in token.split(" ")) or visible(token)


def coloured(tokens: Sequence[str], values: np.ndarray, scale: Scale, at: int) -> list[dict[str, object]]:
    """What a template shows of a text's tokens: values [w] other than 0 have a colour, token `at` has an outline."""
    return [
        {
            "text": running(token),
            "title": f"{visible(token)}: {number(value)}",
            "style": f"background:{scale.colour(value)};color:{scale.ink(value)}" if value else "",
            "at": place == at,
        }
        for place, (token, value) in enumerate(zip(tokens, values.tolist(), strict=True))
    ]


def bars(counts: np.ndarray, edges: np.ndarray) -> list[dict[str, str]]:
    """The bars of a histogram; heights are logarithmic, in percent."""
    most = np.log1p(counts.max(initial=1))
    return [
        {"height": f"{100 * np.log1p(count) / most:.1f}", "title": f"{number(low)} to {number(high)}: {count:,} tokens"}
        for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
