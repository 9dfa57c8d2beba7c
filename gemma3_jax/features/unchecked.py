"""The one message that a loaded dictionary has not been checked against its site.

The mark is on the object that `load` returns, so nothing is global, and dictionaries of another origin, those made
from weights or by `dataclasses.replace`, are taken at their word.
"""

import logging

from gemma3_jax.features.placement import Dictionary

_log = logging.getLogger(__name__)


def mark(sae: Dictionary, unchecked: bool) -> None:
    """Note whether the first use of the dictionary is to be logged."""
    object.__setattr__(sae, "_unchecked", unchecked)  # the dataclass is frozen


def warn_if_unchecked(sae: Dictionary) -> None:
    """Log, at the first use of a loaded dictionary, that it has not been checked."""
    if getattr(sae, "_unchecked", False):
        mark(sae, False)
        _log.warning(
            "this dictionary was loaded for %s, which its files say and nothing has shown; `sae.check(model, texts)` "
            "measures how well it explains that site and those near it",
            sae.site_in,
        )
