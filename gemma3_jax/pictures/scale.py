"""From numbers to colours."""

import dataclasses

import numpy as np

NO_VALUE, GREY_NOTE = "#bdbdbd", "grey: no value"
_STOPS = 11


@dataclasses.dataclass(frozen=True)
class Scale:
    """Colours of the numbers from `low` to `high`; what is not finite is grey.

    `colours` names a ColorBrewer map, which matplotlib and plotly both have; `label` says what the numbers are.
    """

    label: str
    colours: str
    low: float
    high: float

    def ticks(self) -> list[float]:
        """Numbers to mark on a colour bar."""
        return np.linspace(self.low, self.high, 5).tolist()

    def tick_labels(self) -> list[str]:
        """What to write at them."""
        return [f"{tick:.3g}" for tick in self.ticks()]

    def colour(self, value: float) -> str:
        """As #rrggbb."""
        import matplotlib.colors

        if not np.isfinite(value):
            return NO_VALUE
        return matplotlib.colors.to_hex(self.colour_map()((value - self.low) / (self.high - self.low)))

    def ink(self, value: float) -> str:
        """Black or white, whichever reads better on the value's colour."""
        import matplotlib.colors

        # [3], weights of the sRGB luminance (ITU-R BT.709), without its gamma
        luminance = np.dot(matplotlib.colors.to_rgb(self.colour(value)), [0.2126, 0.7152, 0.0722])
        return "#000000" if luminance > 0.5 else "#ffffff"

    def colour_map(self):
        """Matplotlib's colour map."""
        import matplotlib

        return matplotlib.colormaps[self.colours].with_extremes(bad=NO_VALUE)

    def stops(self) -> list[str]:
        """Colours at equal distances from low to high."""
        return [self.colour(value) for value in np.linspace(self.low, self.high, _STOPS)]


def probability_scale(label: str) -> Scale:
    """White to blue from 0 to 1."""
    return Scale(label, "Blues", 0.0, 1.0)


def signed_scale(label: str, values: np.ndarray) -> Scale:
    """Red below 0, white at 0, blue above, as far as the largest finite magnitude."""
    largest = _largest(values)
    return Scale(label, "RdBu", -largest, largest)


def fitting_scale(label: str, values: np.ndarray) -> Scale:
    """Signed where a value is negative; else white to blue from 0 to the largest."""
    if np.any(values[np.isfinite(values)] < 0):
        return signed_scale(label, values)
    return Scale(label, "Blues", 0.0, _largest(values))


def _largest(values: np.ndarray) -> float:
    """The largest finite magnitude; 1 where all is 0, so that a scale has a length."""
    return float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0)) or 1.0
