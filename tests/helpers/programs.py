"""The number of programs that the library has compiled, for tests of recompilation."""

from gemma3_jax.run import compiled


def programs() -> int:
    """The number of programs so far; only differences mean something."""
    return compiled._program.cache_info().misses
