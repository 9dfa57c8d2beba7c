"""The base class of pictures: saving, and HTML pages that do not use the network."""

import abc
import os
from pathlib import Path

from gemma3_jax import atomic
from gemma3_jax.pictures.drawing import Drawing
from gemma3_jax.pictures.labels import as_html

# With this policy the browser refuses to load anything from outside the file, so a page cannot use the network.
_ONLY_THIS_FILE = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


class Picture(abc.ABC):
    """A picture of some data; a notebook renders it and `save` writes it."""

    title: str

    @abc.abstractmethod
    def drawing(self) -> Drawing:
        """The shapes and texts of the picture."""

    def to_html(self) -> str:
        """The picture as a self-contained HTML page."""
        from gemma3_jax.pictures import with_svg

        return page(self.title, with_svg.inline(self.drawing(), self.title))

    def to_png(self) -> bytes:
        """The picture of the HTML as PNG, at 1.5 times its pixels per side.

        Warns of characters that no font of this machine has. Peak memory: about 8 bytes per pixel.
        """
        from gemma3_jax.pictures import with_matplotlib

        return with_matplotlib.png(self.drawing())

    def _repr_html_(self) -> str:
        from gemma3_jax.pictures import with_svg

        return with_svg.as_image(self.drawing(), self.title)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title!r})"

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the picture to `file`, whole or not at all: one HTML page that works offline, or a PNG.

        Args:
            file: ends in .html or .png.

        Raises:
            ValueError: another suffix, or a picture with too many pixels for a screen or an image file.
            OSError: the file cannot be written: see `gemma3_jax.atomic.new_file`.
        """
        path = Path(file)
        suffix = path.suffix.lower()
        if suffix not in (".html", ".png"):
            raise ValueError(f"{path.name}: a picture is saved as .html or .png")
        target = atomic.check_new_file(path)
        content = self.to_png() if suffix == ".png" else self.to_html().encode()
        with atomic.new_file(target) as temporary:
            temporary.write_bytes(content)


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_ONLY_THIS_FILE}">'
        f"<title>{as_html(title)}</title></head>\n"
        f'<body style="margin:0;background:#fff">{body}</body></html>\n'
    )
