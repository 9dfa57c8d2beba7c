"""Which units a process does: those of a part that it is told, or those that it claims before others do."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping

import numpy as np

from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.files import CLAIMS, present, unit_name
from gemma3_jax.harvest.storage import Claim, Place

_log = logging.getLogger(__name__)
# Environment variables of a process: its number, the number of processes, and the first number.
_SCHEDULERS = {
    "Slurm array": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", ""),
    "Kubernetes indexed job": ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", ""),
    "Cloud TPU": ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", ""),
}


def part_of(part: tuple[int, int] | str, environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """The part (number, of how many) of this process; None if it is to claim units.

    Args:
        part: the part itself; "environment", the part that Slurm, Kubernetes or Cloud TPU gives this process; "claim";
            or a text "0/4".
        environment: environment variables.

    Raises:
        StoreError: it is none of these, or the environment says nothing.

    >>> part_of("environment", {"SLURM_PROCID": "2", "SLURM_NTASKS": "8"}), part_of("1/4"), part_of("claim")
    ((2, 8), (1, 4), None)
    """
    if part == "claim":
        return None
    if part == "environment":
        part = _from_environment(environment)
    try:
        number, count = (int(each) for each in (part.split("/") if isinstance(part, str) else part))
    except (TypeError, ValueError):
        number, count = -1, 0
    if not 0 <= number < count:
        raise StoreError(
            f"part is {part!r}; it must be (number, count) with numbers from 0, such as (0, 4), or 'environment', or "
            "'claim'"
        )
    return number, count


def _from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    for number, count, first in _SCHEDULERS.values():
        if number in environment and count in environment:
            hosts = environment[count]
            several = int(hosts) if hosts.isdecimal() else len(hosts.split(","))
            return int(environment[number]) - int(environment.get(first, 0)), several
    known = "; ".join(f"{number} and {count} ({name})" for name, (number, count, _) in _SCHEDULERS.items())
    raise StoreError(f"part is 'environment', which has none of {known}; give part=(number, count), or part='claim'")


def units_of(part: tuple[int, int] | None, place: Place, missing: np.ndarray) -> Iterator[tuple[int, Claim | None]]:
    """The units to do, in order, and the claim of each, if units are claimed.

    `missing` has the numbers of the units without a file.

    Raises:
        StoreError: units are claimed, and the place cannot say whose they are.
    """
    if part is not None:
        number, count = part
        yield from ((int(unit), None) for unit in missing if unit % count == number)
        return
    place.check_claims()
    others = []
    for unit in missing.tolist():
        claim = place.claim(f"{CLAIMS}/{unit}")
        if claim is None:
            others.append(unit)
            continue
        if place.size(unit_name(unit)) is not None:  # another process has done it in the meantime
            claim.release()
            continue
        yield unit, claim
    there = present(place, int(missing.max(initial=-1)) + 1)
    left = [unit for unit in others if not there[unit]]
    if left:
        _log.warning(
            "other processes are doing %d units that are not there yet; if one of them is gone, run again %s",
            len(left),
            place.expiry,
        )
