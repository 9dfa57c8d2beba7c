"""A run of training on disk: one file, which is replaced as a whole, so that a killed run goes on where it was."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gemma3_jax import atomic
from gemma3_jax.features.formats.tensors import of_safetensors
from gemma3_jax.features.training_step import State
from gemma3_jax.reading import CheckpointError, read_metadata

_SETTINGS = "settings"


def fingerprint(values: tuple[np.ndarray, ...]) -> str:
    """A digest of some activations."""
    digest = hashlib.sha256()
    for each in values:
        digest.update(each.tobytes())
    return digest.hexdigest()


class Checkpoint(NamedTuple):
    """Where a run is kept.

    Attributes:
        file: None if it is not.
        every: steps from one writing to the next.
        settings: what the run depends on, as JSON can hold it.
    """

    file: Path | None
    every: int
    settings: Mapping[str, Any]

    def keep(self, state: State) -> None:
        """Write the run: all of the file, or nothing."""
        if self.file is None:
            return
        arrays = {name: np.array(leaf, order="C") for name, leaf in _named(state).items()}
        with atomic.new_durable_file(self.file) as temporary:
            safetensors.numpy.save_file(arrays, temporary, {_SETTINGS: json.dumps(self.settings)})

    def restored(self, new: State) -> State:
        """The state in the file, or `new` if there is none.

        Raises:
            ValueError: the run in the file has other settings; the message names the first that differs.
            CheckpointError: the file is damaged, or does not have a run of this version.
        """
        if self.file is None or not self.file.exists():
            return new
        theirs = json.loads(read_metadata(self.file).get(_SETTINGS, "{}"))
        for name, value in json.loads(json.dumps(self.settings)).items():
            if name not in theirs:
                raise CheckpointError(f"{self.file} has no run of training of this version; give another file")
            if theirs[name] != value:
                values = "" if name == "activations" else f": {theirs[name]!r} there, and {value!r} here"
                raise ValueError(
                    f"{self.file} has a run with other {name}{values}; give the same, or another file for a new run"
                )
        tensors, names = of_safetensors(self.file), _named(new)
        tensors.require(*names)
        return jax.tree.unflatten(jax.tree.structure(new), [jnp.array(tensors.arrays[name]) for name in names])


def _named(state: State) -> dict[str, Any]:
    """The arrays of a state by their path, in the order of its leaves."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
