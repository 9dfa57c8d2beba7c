"""How the tests check shapes and dtypes: beartype, on every function that `conftest.py` has it check."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

# The numeric tower: an int is a float, as for mypy.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable) -> Callable:
    """The function, which then checks its arguments and its result.

    It does not check the fields of dataclasses: JAX rebuilds those that are pytrees with shapes or axes as leaves.
    """
    return function if function.__name__ == "__init__" else _checked(function)
