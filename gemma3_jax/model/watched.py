"""What the modules of the model that have optional values share."""

import flax.linen as nn

from gemma3_jax.config import Gemma3Config


class Watched(nn.Module):
    """A module that computes some of its values only if they are watched.

    Attributes:
        config: the model's shape.
        watched: canonical names of the sites that are captured or edited.
        edited: those of them that are edited.
    """

    config: Gemma3Config
    watched: frozenset[str]
    edited: frozenset[str]
