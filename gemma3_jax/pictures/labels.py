"""Labels of layers, heads and tokens, the same in every picture."""

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

from gemma3_jax.config import Gemma3Config

_LONGEST = 16
_SHOWN = {" ": "␣", "\n": "↵", "\t": "⇥"}
# Python's escape of a character, or one character.
_ESCAPE_OR_ONE = re.compile(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}|.", re.DOTALL)
_DOTTED_CIRCLE = "\u25cc"  # Unicode's sign for the letter that a mark lacks
_SKIN = range(0x1F3FB, 0x1F400)  # they colour the emoji before


def layer_labels(config: Gemma3Config, layers: Iterable[int | str] | None = None) -> list[str]:
    """A label for each layer, local or global. Strings are labels already; None means every layer of the model.

    Raises:
        ValueError: the model has no such layer.

    >>> layer_labels(Gemma3Config.preset("270m"), ["embed", 4, 5])
    ['embed', '4 local', '5 global']
    """
    layers = range(config.num_hidden_layers) if layers is None else layers
    return [layer if isinstance(layer, str) else _layer_label(config, layer) for layer in layers]


def _layer_label(config: Gemma3Config, layer: int) -> str:
    check_index("layer", layer, config.num_hidden_layers)
    return f"{layer} {'local' if config.layer_types[layer] == 'sliding_attention' else 'global'}"


def check_index(kind: str, index: int, size: int) -> None:
    """Raise a ValueError unless `index` is from 0 to `size` - 1."""
    if not 0 <= index < size:
        raise ValueError(f"there is no {kind} {index}; they are 0 to {size - 1}")


def token_labels(tokens: Sequence[str]) -> list[str]:
    r"""Each token with its position in front, so equal tokens have different labels.

    >>> token_labels(["<bos>", "ba", "ba", " \n"])
    ['0 <bos>', '1 ba', '2 ba', '3 ␣↵']
    """
    return [f"{position} {shortened(visible(token))}" for position, token in enumerate(check_tokens(tokens))]


def check_tokens(tokens: Sequence[str]) -> list[str]:
    """The tokens as a list; a ValueError if they are not the strings of one prompt's tokens."""
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("tokens must be a list of strings, one per token, as to_str_tokens returns for one prompt")
    if not len(tokens):
        raise ValueError("there are no tokens")
    return list(tokens)


def visible(text: str) -> str:
    r"""`text` with visible signs for white space, and escapes for characters that do not print.

    A mark without a letter, such as half of a syllable, is on a dotted circle.

    >>> visible(" a\tb\n"), visible("\u200b\x00"), visible(""), visible("\u093e")
    ('␣a⇥b↵', '\\u200b\\x00', "''", '◌ा')
    """
    shown = printable("".join(_SHOWN.get(c, c) for c in text)) or "''"
    return _DOTTED_CIRCLE + shown if _is_mark(shown[0]) else shown


def printable(text: str) -> str:
    """`text` with escapes for characters that do not print."""
    return "".join(c if c.isprintable() else escaped(c) for c in text)


def as_html(text: str) -> str:
    """`text` as part of an HTML document, with escapes for characters that do not print."""
    return html.escape(printable(text))


def escaped(character: str) -> str:
    """Python's escape of a character."""
    return character.encode("unicode_escape").decode()


def shortened(text: str) -> str:
    r"""`text`, cut to the width of a label; letters keep their marks, and escapes are not cut.

    >>> shortened("a" * 17), shortened("北京" * 5), shortened("x" * 13 + "\\u200b" + "x")
    ('aaaaaaaaaaaaaaa…', '北京北京北京北…', 'xxxxxxxxxxxxx…')
    """
    if width(text) <= _LONGEST:
        return text
    kept = ""
    for unit in _units(text):
        if width(kept + unit) > _LONGEST - 1:
            break
        kept += unit
    return kept + "…"


def width(text: str) -> float:
    """The number of columns of `text` in a monospaced font, or a little more.

    Ideographs and most emoji take two, marks none. Other scripts than the European have fonts of their own, which are
    not monospaced.
    """
    return sum(map(_columns, text))


def _columns(character: str) -> float:
    if _is_mark(character):
        return 0 if unicodedata.category(character) != "Mc" else 1
    if unicodedata.east_asian_width(character) in "WF":
        return 2
    return 1.5 if character > "\u0530" and character.isalpha() else 1


def _is_mark(character: str) -> bool:
    """Whether the character belongs to the one before it."""
    return unicodedata.category(character).startswith("M") or ord(character) in _SKIN


def _units(text: str) -> list[str]:
    """The text in pieces that belong together: escapes, and letters with their marks."""
    units: list[str] = []
    for piece in _ESCAPE_OR_ONE.findall(text):
        if units and _is_mark(piece[0]):
            units[-1] += piece
        else:
            units.append(piece)
    return units
