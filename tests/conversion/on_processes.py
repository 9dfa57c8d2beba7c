"""Run by test_processes.py as each of several processes with eight devices in all: loads, saves and exports together.

Arguments: the number of processes, this process, the port, and a directory that all of them share. Writes what held,
by name, to the JSON file with the number of the process.
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from conversion import convert_checkpoint, export_checkpoint, load_params, save_params
from gemma3_jax import TINY
from gemma3_jax.placing import make_mesh, param_shardings
from gemma3_jax.processes import in_all, in_first, to_host
from gemma3_jax.types import Params
from tests.helpers.processes import joined


def main(directory: Path) -> dict[str, object]:
    """What held."""
    held: dict[str, object] = {}
    config, own = convert_checkpoint(TINY)
    mesh = make_mesh(model=8)
    shardings = param_shardings(config, mesh)
    _, params = convert_checkpoint(TINY, shardings=shardings)
    held["loaded"] = equal(params, own)
    held["some parts are elsewhere"] = not params["embed"]["weight"].is_fully_addressable
    # The embedding of this checkpoint is NaN where no device of this process needs it.
    _, partly = convert_checkpoint(directory / f"for process {jax.process_index()}", shardings=shardings)
    held["read its own parts alone"] = equal(partly, own)

    save_params(config, params, directory / "saved")
    held["restored"] = equal(load_params(directory / "saved", shardings=shardings)[1], own)
    if jax.process_index() == 1:
        held["restored by one process"] = equal(load_params(directory / "saved")[1], own)
    save_params(config, own, directory / "saved from own devices")
    held["restored from own devices"] = equal(load_params(directory / "saved from own devices")[1], own)
    held["restored from its own files alone"] = equal(
        load_params(own_files(directory / "saved"), shardings=shardings)[1], own
    )
    # The devices of other processes have parts of the same file, which two processes must not write.
    across = NamedSharding(mesh, PartitionSpec(None, "model"))
    _, columns = convert_checkpoint(TINY, shardings={**shardings, "embed": {"weight": across}})
    save_params(config, columns, directory / "saved from columns")

    export_checkpoint(config, params, directory / "exported", tokenizer=TINY, max_shard_size="100KB")
    export_checkpoint(config, own, directory / "exported from own devices", tokenizer=TINY, max_shard_size="100KB")
    other = {**params, "embed": {"weight": -params["embed"]["weight"]}}
    save_params(config, other, directory / "saved with another embedding")
    export_checkpoint(config, other, directory / "exported with another embedding", max_shard_size="100KB")

    # The last row is on the last device of the last process.
    damaged = {**params, "embed": {"weight": params["embed"]["weight"].at[-1, 0].set(np.nan)}}
    for name, write in (("save", save_params), ("export", export_checkpoint)):
        held[f"{name} of NaN"] = error_of(lambda write=write: write(config, damaged, directory / "never"))
        held[f"{name} where something is"] = error_of(lambda write=write: write(config, params, directory / "saved"))
    held["Ctrl-C in the last"] = error_of(lambda: in_all(interrupted))
    held["nothing is left behind"] = not list(directory.glob(".gemma3-jax-*"))
    held["text"] = in_first(lambda: "é" * 5000) == "é" * 5000
    held["sum"] = in_all(lambda: jax.process_index()) == jax.process_index()
    return held


def equal(params: Params, wanted: Params) -> bool:
    """Whether parameters, of all processes together, have the bits of these."""
    return jax.tree.all(jax.tree.map(lambda a, b: to_host(a).tobytes() == np.asarray(b).tobytes(), params, wanted))


def own_files(saved: Path) -> Path:
    """A copy of a directory without the files of the embedding that the devices of other processes need."""
    copy = shutil.copytree(saved, saved.with_name(f"{saved.name} for process {jax.process_index()}"))
    files = sorted((copy / "params/embed.weight").glob("?.0"))
    each = len(files) // jax.process_count()
    own = files[jax.process_index() * each :][:each]
    for file in files:
        if file not in own:
            file.unlink()
    return copy


def interrupted() -> None:
    """Ctrl-C in the last process alone."""
    if jax.process_index() == jax.process_count() - 1:
        raise KeyboardInterrupt


def error_of(write) -> str:
    """The error of a call that fails."""
    try:
        write()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    process, here = joined(sys.argv[1:])
    (here / f"{process}.json").write_text(json.dumps(main(here)))
