"""Old names of arguments, which work for one minor version with a warning: see CHANGELOG.md."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that also takes arguments by their old names, and warns: `renamed(old="new")`.

    Raises:
        TypeError: at a call with both names.

    >>> import warnings
    >>> @renamed(names="capture")
    ... def count(capture):
    ...     return len(capture)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     count(names="ab"), str(caught[0].message)
    (2, 'count: the argument names is now capture')
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in new_names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{function.__name__}: give {new} and not {old}, which is its old name")
                    message = f"{function.__name__}: the argument {old} is now {new}"
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
