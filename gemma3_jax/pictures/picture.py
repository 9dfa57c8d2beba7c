"""What every picture can do: be saved whole, and be a page that asks the network for nothing."""

import abc
import html
import os
from pathlib import Path

# The browser itself refuses what is not in the file: the promise that a page needs no network is not ours to break.
_ONLY_THIS_FILE = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


class Picture(abc.ABC):
    """A picture of some data; a notebook shows it, `save` writes it."""

    title: str

    @abc.abstractmethod
    def to_html(self) -> str:
        """The picture as a self-contained HTML page."""

    @abc.abstractmethod
    def to_png(self) -> bytes:
        """The picture as the contents of a PNG file."""

    @abc.abstractmethod
    def _repr_html_(self) -> str: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title!r})"

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the picture to `file`, all or nothing: one HTML page that needs no network, or a PNG.

        Args:
            file: ends in .html (about 5 MB for heatmaps, which carry plotly's script with them) or .png.

        Raises:
            ValueError: another suffix, or a picture of more pixels than a screen or an image file takes.
            FileNotFoundError: the directory does not exist.
        """
        path = Path(file)
        suffix = path.suffix.lower()
        if suffix not in (".html", ".png"):
            raise ValueError(f"{path.name}: a picture is saved as .html or .png")
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{path.parent} is no directory; {path.name} has no place there")
        content = self.to_png() if suffix == ".png" else self.to_html().encode()
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_ONLY_THIS_FILE}">'
        f"<title>{html.escape(title)}</title></head>\n"
        f'<body style="margin:0;background:#fff">{body}</body></html>\n'
    )
