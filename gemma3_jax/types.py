"""The types that signatures of several rooms share, under short names."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np
import numpy.typing
from jaxtyping import PyTree

__all__ = [
    "ArrayLike",
    "Integers",
    "IntegersLike",
    "JsonObject",
    "Params",
    "PyTree",
    "Settings",
    "Shardings",
    "Tokenizer",
]

# The parameters of a model, as `conversion.convert_checkpoint` returns them: mappings by name down to arrays, as in
# params["blocks_0"]["attn"]["q"]["weight"]. Also a part of them, such as params["blocks_0"].
Params: TypeAlias = Mapping[str, Any]
# How parameters are cut over devices: one sharding for all, or one for each, in mappings like those of `Params`.
Shardings: TypeAlias = jax.sharding.Sharding | Mapping[str, Any]
# What NumPy makes an array of: an array of any library, a number, or nested lists of numbers.
ArrayLike: TypeAlias = numpy.typing.ArrayLike
# Checked integers: on the host, or traced.
Integers: TypeAlias = np.ndarray | jax.Array
# Integers as a caller gives them: an array of any library, or nested lists.
IntegersLike: TypeAlias = numpy.typing.ArrayLike
# An object of a JSON file as Python reads it, or what becomes one. Values are checked where they are used.
JsonObject: TypeAlias = dict[str, Any]
# Settings or fields by name that are only read; as those of a `JsonObject`, values are checked where they are used.
Settings: TypeAlias = Mapping[str, Any]
# A function or a method whose result depends on its arguments in ways that its type does not say.
Method: TypeAlias = Callable[..., Any]


class Tokenizer(Protocol):
    """What this package uses of a Hugging Face tokenizer."""

    @property
    def __call__(self) -> Method: ...

    @property
    def model_max_length(self) -> int: ...

    @property
    def apply_chat_template(self) -> Method: ...

    @property
    def convert_ids_to_tokens(self) -> Method: ...

    @property
    def decode(self) -> Method: ...

    @property
    def save_pretrained(self) -> Method: ...
