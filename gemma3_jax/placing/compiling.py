"""The process that compiles for a machine that is not there: reads a job from its input, writes JSON to its output.

`gemma3_jax.placing.fitting` starts it, with an environment that JAX must see before it starts.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from collections.abc import Callable

from jax.experimental import topologies
from jax.sharding import Mesh

from gemma3_jax.meshes import DATA, make_mesh
from gemma3_jax.placing.machines import Machine
from gemma3_jax.placing.programs import Program, Work, abstract_params, added_bytes, bytes_per_device, compiled_programs
from gemma3_jax.types import JsonObject

_MOST_TRIES = 6  # compilations in the search for the largest batch
_CLOSE = 16  # the search ends when the largest batch is known to one part in this many


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile: the work, the machine, the devices that share the parameters, the rows of the batch, and whether
    to search for the largest batch.
    """

    work: Work
    machine: Machine
    model: int
    batch: int
    search: bool


def answer(job: Job) -> JsonObject:
    """The figures of a job: weights, programs and the largest batch."""
    machine, work = job.machine, job.work
    mesh = _mesh(machine, job.model)
    weights = bytes_per_device(abstract_params(work.config, work.dtype, mesh, work.scan_layers))
    added = added_bytes(work, mesh)
    programs = compiled_programs(work, mesh, job.batch)
    largest = None
    if job.search:

        def needed(batch: int) -> tuple[bool, int | None]:
            compiled = programs if batch == job.batch else compiled_programs(work, mesh, batch)
            return is_within(compiled, machine.limit), peak_of(compiled)

        largest = largest_batch(needed, job.batch, mesh.shape[DATA], weights + added, machine.limit)
    return {
        "weights": weights,
        "added": added,
        "programs": [dataclasses.asdict(each) for each in programs],
        "largest_batch": largest,
    }


def peak_of(programs: list[Program]) -> int | None:
    """The peak of the program that needs the most; None if the compiler refused one and did not say."""
    peaks = [program.peak for program in programs]
    return None if None in peaks else max(peak for peak in peaks if peak is not None)


def is_within(programs: list[Program], limit: int) -> bool:
    """Whether all programs fit."""
    return not any(program.refused or (program.peak or 0) > limit for program in programs)


def largest_batch(
    needed: Callable[[int], tuple[bool, int | None]], batch: int, step: int, weights: int, limit: int
) -> int:
    """The largest batch found to fit, a multiple of `step`; 0 if none does.

    Each guess is where a straight line through the bytes known so far reaches the limit. A batch that is larger by
    `step` than the result, or by a sixteenth, does not fit, unless the tries run out.

    Args:
        needed: whether a batch fits, and the bytes that it needs, or None.
        batch: the first guess.
        step: number of devices that share the rows.
        weights: bytes that an empty batch needs.
        limit: bytes that there are.

    >>> largest_batch(lambda batch: (batch <= 37, 100 + 10 * batch), 8, 1, 100, 470)
    37
    """
    low, below = 0, weights
    high, above = 0, None  # 0 until a batch does not fit
    guess = -(-batch // step) * step
    for _ in range(_MOST_TRIES if weights < limit else 0):
        good, peak = needed(guess)
        if good:
            low, below = guess, peak or below
        else:
            high, above = guess, peak
        if high and high - low <= max(step, low // _CLOSE):
            break
        if not high:
            line = low * (limit - weights) / max(below - weights, 1)
        elif above is not None and above > below:
            line = low + (high - low) * (limit - below) / (above - below)
        else:
            line = (low + high) / 2
        guess = max(int(line) // step * step, low + step)
        guess = min(guess, high - step) if high else guess
    return low


def _mesh(machine: Machine, model: int) -> Mesh:
    """The mesh of a machine that is not there."""
    described: dict[str, str] = {"topology": machine.topology} if machine.platform == "cuda" else {}
    name = machine.name if machine.platform == "cuda" else machine.topology
    topology = topologies.get_topology_desc(name, machine.platform, **machine.options, **described)
    return make_mesh(model, topology.devices)


def not_sent(error: Exception) -> str:
    """The message for a job that cannot be pickled, or not read again."""
    return (
        f"a reduction or an edit cannot be sent to the process that compiles: {error}. Define your functions at the "
        "top level of a module, not in a notebook or in another function"
    )


def main() -> None:
    """Answer the job of the standard input. An error that has a remedy is an answer, too."""
    try:
        job: Job = pickle.load(sys.stdin.buffer)
    except (AttributeError, ImportError) as error:
        print(json.dumps({"error": not_sent(error)}))
        return
    try:
        result = answer(job)
    except ValueError as error:
        result = {"error": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
