"""The error that a person sees when a store cannot be written or read."""

from gemma3_jax.messages import printable


class StoreError(ValueError):
    """An activation store that cannot be written, continued or read; the message names the file and the remedy."""

    def __init__(self, message: object):
        super().__init__(printable(message))
