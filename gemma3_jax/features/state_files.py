"""How far a run is, in one file that is whole at any moment. The file says which run it is of; another is refused."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gemma3_jax import atomic
from gemma3_jax.reading import CheckpointError, check_file
from gemma3_jax.types import Settings

_FORMAT, _KEY = 1, "gemma3_jax.state"


def write_state(
    file: Path, arrays: Mapping[str, np.ndarray | jax.Array], identity: Settings, counts: Mapping[str, int]
) -> None:
    """Replace the file; the new one is whole on the disk before the old one goes.

    Args:
        file: where the state is kept.
        arrays: what is known, by name.
        identity: by name, as JSON can hold it, what must be the same for another run to continue this one.
        counts: how much is done.
    """
    described = {"identity": {"format": _FORMAT, **identity}, "counts": counts}
    contiguous = {name: np.array(array, order="C") for name, array in arrays.items()}
    with atomic.new_durable_file(file) as temporary:
        save_file(contiguous, temporary, {_KEY: json.dumps(described)})


def read_state(file: Path, kind: str, identity: Settings) -> tuple[dict[str, np.ndarray], dict[str, int]] | None:
    """The arrays and the counts that an earlier run has written; None if there is no file.

    Args:
        file: where the state is kept.
        kind: what runs, for messages: "search".
        identity: as in `write_state`.

    Raises:
        CheckpointError: the file is of another run, and the message says what differs; or it is not such a file.
    """
    if not file.exists():
        return None
    check_file(file)
    try:
        with safe_open(file, "numpy") as opened:
            described = json.loads((opened.metadata() or {})[_KEY])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not the state of a {kind}, or is damaged; give another file, or delete it"
        ) from error
    ours, theirs = json.loads(json.dumps({"format": _FORMAT, **identity})), described["identity"]
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if names:
        changes = "; ".join(f"{name} is {ours.get(name)}, and was {theirs.get(name)}" for name in names)
        raise CheckpointError(
            f"{file} has the state of another {kind}: {changes}. Give the same arguments to continue it, or another "
            "file"
        )
    return arrays, described["counts"]
