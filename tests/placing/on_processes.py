"""Run by test_everything_on_meshes.py as each of several processes: what a model does, on one mesh of all.

Arguments: those of `tests.helpers.processes.joined`. The first process writes the results to results.npz; each writes
its parts of captured values to its own file.
"""

import sys
from pathlib import Path

import numpy as np

from gemma3_jax.placing import make_mesh
from tests.helpers.processes import joined
from tests.placing.everything import TEXTS, generated, on_host, runs, sweeps, two_layers

SITES = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern"]


def main(process: int, directory: Path) -> None:
    model = two_layers(mesh=make_mesh(model=2))
    rows = [TEXTS[0]] * 4 + TEXTS[1:] * 2
    _, cache = model.run_with_cache(rows, SITES)
    cache.save(directory / "whole.safetensors")
    cache.numpy().save(directory / f"part {process}.safetensors")
    for name, whole in (("part", False), ("whole", True)):
        [batch] = model.activations([rows[:7]], SITES, whole=whole)
        batch.save(directory / f"{name} of a batch {process}.safetensors")
    results = on_host({**runs(model), **generated(model), **sweeps(model)})
    if process == 0:
        np.savez(directory / "results.npz", **results)


if __name__ == "__main__":
    main(*joined(sys.argv[1:]))
