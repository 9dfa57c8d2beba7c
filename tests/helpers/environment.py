"""The environment of processes that the tests start."""

import os


def as_users() -> dict[str, str]:
    """The environment without the tests' quick compilation: programs are optimised as for users."""
    return {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
