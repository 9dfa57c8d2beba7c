"""Run by test_shardings.py in a process of its own: loads sources cut over eight devices, and writes them again.

Arguments: a directory with the sources, and one for results. Prints JSON: what held, by name.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from conversion import convert_checkpoint, export_checkpoint, load_params, save_params
from gemma3_jax.conversion.placement import Placement
from gemma3_jax.conversion.store import is_converted
from gemma3_jax.placing import make_mesh, param_shardings
from gemma3_jax.types import Params, Shardings

MODEL_SIZES = (1, 4, 8)  # of the mesh axis "model"


def main(sources: Path, results: Path) -> None:
    """Compare every source on every mesh."""
    held = {}
    for source in sorted(sources.iterdir()):
        config, whole = load(source)
        for model in MODEL_SIZES:
            shardings = param_shardings(config, make_mesh(model=model))
            held[f"{source.name}, model={model}"] = equal(load(source, shardings)[1], whole, shardings)
    mesh = make_mesh(model=8)
    replicated = NamedSharding(mesh, PartitionSpec())
    config, whole = convert_checkpoint(sources / "safetensors", dtype="float32")
    held["one sharding for all"] = equal(
        convert_checkpoint(sources / "safetensors", dtype="float32", shardings=replicated)[1],
        whole,
        jax.tree.map(lambda leaf: replicated, whole),
    )
    shardings = param_shardings(config, mesh)
    _, params = convert_checkpoint(sources / "safetensors", dtype="float32", shardings=shardings)
    save_params(config, params, results / "saved")
    held["saved"] = equal(load_params(results / "saved", shardings=shardings)[1], whole, shardings)
    held["saved, read by one device"] = equal(load_params(results / "saved")[1], whole, None)
    save_params(config, whole, results / "saved by one device")
    rows = NamedSharding(make_mesh(model=2), PartitionSpec("data"))
    short = jax.tree.map(lambda leaf: rows if leaf.shape[0] % 4 == 0 else replicated, whole)
    save_params(config, jax.device_put(whole, short), results / "saved by rows")
    export_checkpoint(config, params, results / "exported", max_shard_size="100KB")
    export_checkpoint(config, whole, results / "exported by one device", max_shard_size="100KB")
    try:
        convert_checkpoint(sources / "safetensors", shardings=NamedSharding(mesh, PartitionSpec("model")))
    except ValueError as error:
        held["an axis that is not divisible"] = "do not suit blocks_0/attn/q/weight [4, 96, 24]" in str(error)
    # The control: parts that go to each other's devices.
    targets = Placement._targets
    Placement._targets = lambda self: [  # type: ignore[method-assign]
        (part, devices) for (part, _), (_, devices) in zip(targets(self), list(targets(self))[::-1], strict=True)
    ]
    held["parts in the wrong order"] = equal(
        convert_checkpoint(sources / "safetensors", dtype="float32", shardings=shardings)[1], whole, shardings
    )
    print(json.dumps(held))


def load(source: Path, shardings: Shardings | None = None) -> tuple:
    """The config and the parameters of any source: an adapter names its base."""
    return (load_params if is_converted(source) else convert_checkpoint)(source, shardings=shardings)


def equal(params: Params, wanted: Params, shardings: Params | None) -> bool:
    """Whether parameters have the same bits as the wanted ones, and the shardings."""

    def same(a: jax.Array, b: jax.Array) -> bool:
        return a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()

    cut = {} if shardings is None else jax.tree.map(lambda a, sharding: a.sharding == sharding, params, shardings)
    return jax.tree.all((jax.tree.map(same, params, wanted), cut))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
