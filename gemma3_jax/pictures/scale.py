"""Maps from numbers to colours."""

import dataclasses
from types import ModuleType

import numpy as np

from gemma3_jax.extras import needs_extra

NO_VALUE, GREY_NOTE = "#bdbdbd", "grey: no value"
_TICKS = 5  # intervals between the ticks of a colour bar, at most
_STOPS = 64  # colours of a bar


@dataclasses.dataclass(frozen=True)
class Scale:
    """Colours for the numbers from `low` to `high`; numbers beyond have those of the ends, and NaN is grey.

    From 0 or a positive `low`, white turns into blue. With a negative `low`, 0 is white, smaller numbers are red and
    larger ones blue, equally dark at the same distance from 0. `label` is the name of the numbers. `beyond` says
    whether there are numbers below `low` and above `high`.
    """

    label: str
    low: float
    high: float
    beyond: tuple[bool, bool] = (False, False)

    def ticks(self) -> dict[float, str]:
        """Round numbers to mark on a colour bar, and the ends with "≤" or "≥" if there are numbers beyond."""
        places = _matplotlib().ticker.MaxNLocator(_TICKS, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        margin = (self.high - self.low) / 12  # an end's label needs so much of the bar
        ends = {
            end: f"{sign} {end:.6g}"
            for end, sign, is_beyond in zip((self.low, self.high), "≤≥", self.beyond, strict=True)
            if is_beyond
        }
        inside = [
            float(place)
            for place in places
            if self.low - 1e-6 * margin <= place <= self.high + 1e-6 * margin
            and all(abs(place - end) > margin for end in ends)
        ]
        return dict(sorted(({place: f"{place + 0.0:.10g}" for place in inside} | ends).items()))

    def colours(self, values: np.ndarray) -> np.ndarray:
        """[..., 3] uint8, the colours of numbers [...]."""
        if self.low < 0:
            largest = max(-self.low, self.high)
            low, high, name = -largest, largest, "RdBu"
        else:
            low, high, name = self.low, self.high, "Blues"
        # A colour map of matplotlib and ColorBrewer
        colour_map = _matplotlib().colormaps[name].with_extremes(bad=NO_VALUE)
        clipped = np.clip(np.asarray(values, np.float64), self.low, self.high)
        colours: np.ndarray = colour_map(np.ma.masked_invalid((clipped - low) / (high - low)), bytes=True)
        return colours[..., :3]

    def colour(self, value: float) -> str:
        """The colour of a number, as #rrggbb."""
        return "#" + bytes(self.colours(np.array([value]))[0]).hex()

    def ink(self, value: float) -> str:
        """Black or white, the one with more contrast to the value's colour."""
        # [3], weights of the sRGB luminance (ITU-R BT.709), without its gamma
        luminance = self.colours(np.array([value]))[0] / 255 @ [0.2126, 0.7152, 0.0722]
        return "#000000" if luminance > 0.5 else "#ffffff"

    def stops(self) -> np.ndarray:
        """[stops, 3] uint8, the colours at equal distances from low to high."""
        return self.colours(np.linspace(self.low, self.high, _STOPS))


def _matplotlib() -> ModuleType:
    """matplotlib, imported when something is drawn, so `import gemma3_jax` does not load it."""
    with needs_extra("plots", "pictures need"):
        import matplotlib.colors
        import matplotlib.ticker
    return matplotlib


def fitting_scale(label: str, values: np.ndarray, vmin: float | None = None, vmax: float | None = None) -> Scale:
    """The scale of some values, from `vmin` to `vmax`.

    Without these, it has a half for negative values if there are any, and one for positive values if there are any or
    if all values are 0. Both halves end at the largest finite magnitude, or at the given end.

    Raises:
        ValueError: vmin is not below vmax, or they are not finite.
    """
    finite = values[np.isfinite(values)]
    least, most = float(np.min(finite, initial=0.0)), float(np.max(finite, initial=0.0))
    largest = max(-least, most) or 1.0
    low = (-largest if least < 0 else 0.0) if vmin is None else float(vmin)
    high = (largest if most > 0 or least == 0 else 0.0) if vmax is None else float(vmax)
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"the colours go from vmin = {low:g} to vmax = {high:g}; pass finite numbers, vmin < vmax")
    return Scale(label, low, high, (bool(np.any(finite < low)), bool(np.any(finite > high))))
