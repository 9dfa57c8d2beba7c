"""The sites that a dictionary is trained at, from the names that a caller gives."""

from collections.abc import Sequence

import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.features.hookpoints import expanded
from gemma3_jax.features.training.batches import Sites, Store
from gemma3_jax.sites.names import layer_of, resolve

Names = str | Sequence[str]


def sites_of(activations: object, site_in: Names | None, site_out: Names | None) -> Sites:
    """The canonical names of the sites that are read, and of those that are written: none, for an autoencoder.

    Raises:
        ValueError: they are not those of a dictionary.
        UnknownSite: no site has a name.
    """
    if site_in is None:
        if not isinstance(activations, Store) or len(activations.sites) != 1:
            there = f"; the store has {', '.join(activations.sites)}" if isinstance(activations, Store) else ""
            raise ValueError(f"give site_in=, the name of the site that has these activations{there}")
        site_in = activations.sites[0]
    sites = tuple(_named(activations, names) for names in (site_in, site_out) if names is not None)
    if len(sites[0]) != len(sites[-1]) or len(sites) < len(sites[0]) == len(sites[-1]) > 1:
        raise ValueError(
            f"site_in names {len(sites[0])} sites, and site_out {len(sites[1]) if len(sites) > 1 else 0}; a "
            "cross-layer transcoder reads and writes one site of every layer, and other dictionaries read one"
        )
    for names in sites:
        layers = [layer_of(name) or 0 for name in names]
        if layers != sorted(set(layers)):
            raise ValueError(f"the sites {', '.join(names)} must be of several layers, in their order")
    return sites


def _named(activations: object, names: Names) -> tuple[str, ...]:
    deepest = Gemma3Config.preset("27b")
    if not isinstance(names, str) or "*" not in names:
        return tuple(resolve(name, deepest).name for name in expanded(names, [0]))
    if isinstance(activations, Store):
        every = [resolve(name, deepest).name for name in expanded(names, range(deepest.num_hidden_layers))]
        found = tuple(name for name in every if name in activations.sites)
        if not found:
            raise ValueError(f"the store has no site {names}; it has {', '.join(activations.sites)}")
        return found
    if not isinstance(activations, tuple):
        raise ValueError(f"{names} does not say how many layers the batches have; give a list of names")
    layers = range(np.shape(activations[0])[0])
    return tuple(resolve(name, deepest).name for name in expanded(names, layers))
