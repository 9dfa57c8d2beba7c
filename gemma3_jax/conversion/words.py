"""Lists in messages."""

from collections.abc import Sequence

from gemma3_jax.messages import printable


def listed(names: Sequence[str], most: int = 5) -> str:
    """At most `most` names, and the number of the others; control characters are escaped."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + rest


def either(names: tuple[str, ...]) -> str:
    """The names, as alternatives."""
    return f"{', '.join(names[:-1])} or {names[-1]}"
