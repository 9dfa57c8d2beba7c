"""Maps from numbers to colours."""

import dataclasses
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from gemma3_jax.extras import needs_extra

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

NO_VALUE, GREY_NOTE = "#bdbdbd", "grey: no value"
_STOPS = 11


@dataclasses.dataclass(frozen=True)
class Scale:
    """Colours for the numbers from `low` to `high`; numbers that are not finite are grey.

    `colours` names a ColorBrewer map, which matplotlib and plotly both have; `label` is the name of the numbers.
    """

    label: str
    colours: str
    low: float
    high: float

    def ticks(self) -> list[float]:
        """Numbers to mark on a colour bar."""
        return np.linspace(self.low, self.high, 5).tolist()

    def tick_labels(self) -> list[str]:
        """The labels of `ticks`."""
        return [f"{tick:.3g}" for tick in self.ticks()]

    def colour(self, value: float) -> str:
        """The colour of a number, as #rrggbb."""
        if not np.isfinite(value):
            return NO_VALUE
        return _matplotlib().colors.to_hex(self.colour_map()((value - self.low) / (self.high - self.low)))

    def ink(self, value: float) -> str:
        """Black or white, the one with more contrast to the value's colour."""
        # [3], weights of the sRGB luminance (ITU-R BT.709), without its gamma
        luminance = np.dot(_matplotlib().colors.to_rgb(self.colour(value)), [0.2126, 0.7152, 0.0722])
        return "#000000" if luminance > 0.5 else "#ffffff"

    def colour_map(self) -> "Colormap":
        """Matplotlib's colour map."""
        return _matplotlib().colormaps[self.colours].with_extremes(bad=NO_VALUE)

    def stops(self) -> list[str]:
        """Colours at equal distances from low to high."""
        return [self.colour(value) for value in np.linspace(self.low, self.high, _STOPS)]


def _matplotlib() -> ModuleType:
    """matplotlib, imported when something is drawn, so `import gemma3_jax` does not load it."""
    with needs_extra("plots", "pictures need"):
        import matplotlib.colors
    return matplotlib


def probability_scale(label: str) -> Scale:
    """White to blue from 0 to 1."""
    return Scale(label, "Blues", 0.0, 1.0)


def signed_scale(label: str, values: np.ndarray) -> Scale:
    """Red below 0, white at 0 and blue above 0, up to the largest finite magnitude."""
    largest = _largest(values)
    return Scale(label, "RdBu", -largest, largest)


def fitting_scale(label: str, values: np.ndarray) -> Scale:
    """A signed scale if a value is negative; otherwise white to blue from 0 to the largest value."""
    if np.any(values[np.isfinite(values)] < 0):
        return signed_scale(label, values)
    return Scale(label, "Blues", 0.0, _largest(values))


def _largest(values: np.ndarray) -> float:
    """The largest finite magnitude; 1 if all are 0, so that the scale is not empty."""
    return float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0)) or 1.0
