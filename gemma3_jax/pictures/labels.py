"""Labels of layers, heads and tokens, the same in every picture."""

import unicodedata
from collections.abc import Iterable, Sequence

from gemma3_jax.config import Gemma3Config

_LONGEST = 16
_SHOWN = {" ": "␣", "\n": "↵", "\t": "⇥"}


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

    >>> visible(" a\tb\n"), visible("\u200b\x00"), visible("")
    ('␣a⇥b↵', '\\u200b\\x00', "''")
    """
    return "".join(_SHOWN.get(c) or (c if c.isprintable() else escaped(c)) for c in text) or "''"


def escaped(character: str) -> str:
    """Python's escape of a character."""
    return character.encode("unicode_escape").decode()


def shortened(text: str) -> str:
    """`text`, cut to the length of a label."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def width(text: str) -> int:
    """The number of columns of `text` in a monospaced font: ideographs and most emoji take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
