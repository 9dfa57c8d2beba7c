"""Which units a process does: its part, by number or by what a scheduler says, or what is unclaimed."""

import numpy as np
import pytest

from gemma3_jax.harvest import StoreError
from gemma3_jax.harvest.files import CLAIMS, remove_abandoned, unit_name
from gemma3_jax.harvest.folders import Folder
from gemma3_jax.harvest.parts import part_of, units_of


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "2"}, (3, 4)),
        ({"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "2"}, (0, 2)),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c"}, (1, 3)),
    ],
)
def test_schedulers(environment, part):
    """What each of them sets."""
    assert part_of("environment", environment) == part


@pytest.mark.parametrize("part", [(4, 4), (-1, 2), (0, 0), "0", "a/b", "1/1", None, 3, "environment"])
def test_what_is_not_a_part(part):
    """One clear error."""
    with pytest.raises(StoreError, match="part is"):
        part_of(part, {})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_have_every_unit_once(tmp_path, count):
    """Any number of processes."""
    missing = np.asarray([0, 2, 3, 5, 8, 9])
    done = [unit for i in range(count) for unit, _ in units_of((i, count), Folder(tmp_path), missing)]
    assert sorted(done) == missing.tolist()


def test_claims(tmp_path):
    """A unit that is claimed, or done, is passed over; one that is given up is taken; nothing is left over."""
    missing, place = np.arange(4), Folder(tmp_path)
    first, second = units_of(None, place, missing), units_of(None, place, missing)
    unit, claim = next(first)
    assert unit == 0
    assert next(second)[0] == 1  # unit 0 belongs to the first
    place.write(unit_name(2), [b"done by somebody"])
    taken, other = next(first)
    assert taken == 3
    for each in (claim, other):
        each.release()
    assert next(units_of(None, place, missing))[0] == 0  # control: it is free again
    del second, first
    (tmp_path / CLAIMS / "7").write_text("")  # of a process that was killed
    remove_abandoned(place)
    assert not (tmp_path / CLAIMS / "7").exists()
