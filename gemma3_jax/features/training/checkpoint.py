"""A run of training on disk, so that a killed run goes on where it was."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.features.state_files import read_state, write_state
from gemma3_jax.features.training.step import State
from gemma3_jax.types import Settings


def fingerprint(values: tuple[np.ndarray, ...]) -> str:
    """A digest of some activations."""
    digest = hashlib.sha256()
    for each in values:
        digest.update(each.tobytes())
    return digest.hexdigest()[:12]


class Checkpoint(NamedTuple):
    """Where a run is kept.

    Attributes:
        file: None if it is not.
        every: steps from one writing to the next.
        settings: what the run depends on, as JSON can hold it.
    """

    file: Path | None
    every: int
    settings: Settings

    def keep(self, state: State) -> None:
        """Write the run: all of the file, or nothing."""
        if self.file is not None:
            write_state(self.file, _named(state), self.settings, {"steps": int(state.step)})

    def restored(self, new: State) -> State:
        """The state in the file, or `new` if there is none; errors as in `read_state`."""
        known = None if self.file is None else read_state(self.file, "training run", self.settings)
        if known is None:
            return new
        return jax.tree.unflatten(jax.tree.structure(new), [jnp.array(known[0][name]) for name in _named(new)])


def _named(state: State) -> dict[str, jax.Array]:
    """The arrays of a state by their path, in the order of its leaves."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
