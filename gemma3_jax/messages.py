"""Text from files, made safe for a message or a log."""

_MOST = 1000  # characters


def printable(text: object) -> str:
    """`text` on one line: control characters are escaped, and a text of more than 2,000 characters loses its middle.

    A key of a file may hold anything: an escape sequence would change the user's terminal, a newline would forge a
    line of a log, and a lone surrogate cannot be printed.

    >>> print(printable("a\\x1b[2Jb\\n"))
    a\\x1b[2Jb\\n
    >>> printable("漢字, naïve")
    '漢字, naïve'
    """
    text = str(text)
    if len(text) > 2 * _MOST:
        text = f"{text[:_MOST]} ... {text[-_MOST:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
