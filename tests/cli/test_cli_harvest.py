"""`gemma3-jax harvest`: a store from a file, how far it is, and whether it is whole."""

import sys

import pytest

from gemma3_jax import TINY
from gemma3_jax.cli.main import main
from gemma3_jax.harvest import ActivationStore


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command; its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gemma3-jax", "harvest", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run


def test_a_store_on_the_command_line(command, tmp_path):
    """Run, status, verify; then a unit is damaged, and repaired."""
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    corpus.write_text('{"body": "ba ke lo mu ti so re"}\n' * 9)
    run = ("run", TINY, corpus, out, "--site", "blocks.{1,3}.hook_out", "--cast", "int8", "--rows", 2, "--length", 24)
    code, printed, errors = command(*run, "--field", "body", "--part", "0/2")
    assert (code, "3 units" in errors or "of 2 units" in printed) == (0, True)
    code, printed, _ = command("verify", out)
    assert code == 1
    assert command(*run, "--field", "body")[0] == 0
    code, printed, _ = command("status", out)
    assert "2 of 2" in printed
    assert "blocks.3.hook_out" in printed
    assert command("verify", out)[:2] == (0, f"{out} is whole.\n")
    assert len(ActivationStore(out)) == 72
    file = out / "units" / "000" / "000001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, errors = command("verify", out)
    assert (code, errors.count("\n")) == (1, 1)
    assert "is damaged" in errors
    assert command(*run, "--field", "body", "--repair")[0] == 0
    assert command("verify", out)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--cast", "int4"), "--cast"), (("--pack", "maybe"), "--pack"), (("--field", "text"), "--field")],
)
def test_wrong_options(command, tmp_path, options, message):
    """One line that names the option, before the model is loaded."""
    (tmp_path / "corpus.txt").write_text("ba ke")
    arguments = ("run", "no such model", tmp_path / "corpus.txt", tmp_path / "out", "--site", "blocks.1.hook_out")
    code, _, errors = command(*arguments, *options)
    assert code == 1
    assert message in errors
