"""A harvest may be killed at any moment, and go on in any number of processes: the files are the same."""

from gemma3_jax.harvest import verify
from tests.harvest.killed import contents, finish, kill_at_random, start


def test_killed_and_resumed(tmp_path):
    """Resumed by two processes that claim units: the same set of files, byte for byte, and nothing left over."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    killed.mkdir()
    kill_at_random(killed, ["0/1"], seed=0)
    before = contents(killed)
    finish([start(undisturbed, "0/1"), start(killed, "claim"), start(killed, "claim")])
    found = contents(killed)
    assert found == contents(undisturbed)
    assert len(found) > 20
    assert before != found  # control: there was something left to do
    verify(killed)
