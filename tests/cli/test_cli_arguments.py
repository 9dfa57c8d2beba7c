"""The arguments of `gemma3-jax`: each has a help text, bad ones are refused before a model loads, names are literal."""

import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import typer
from rich.console import Console

from gemma3_jax import TINY
from gemma3_jax.cli import main, shared
from gemma3_jax.parity import Report
from gemma3_jax.sites.names import UnknownSite, rows_named
from gemma3_jax.sites.table import HEAD_SITES, SITES
from tests.helpers.environment import as_users

PROMPT = ("--prompt", "ba ke")
# What rich would take for markup and for an emoji.
STRANGE = "[bold]a [red]b :smile:"


def without_help(app) -> list[str]:
    """The arguments and options of the commands that have no help text."""
    pairs = []
    for name, command in typer.main.get_command(app).commands.items():
        for each in getattr(command, "commands", {"": command}).values():
            pairs += [(name, parameter) for parameter in each.params]
    return [f"{name} {parameter.name}" for name, parameter in pairs if not parameter.help]


def test_every_argument_has_a_help_text():
    """Also arguments without a dash. Negative control: a command that has one without."""
    assert without_help(main.app) == []
    app = typer.Typer()

    @app.command()
    def good(bare: str) -> None: ...

    @app.command()
    def other() -> None: ...

    assert without_help(app) == ["good bare"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", TINY, *PROMPT, "--max-new-tokens", 0], "max_new_tokens is 0"),
        (["generate", TINY, *PROMPT, "--max-new-tokens", 256], "must fit the model's context of 256 tokens"),
        (["generate", TINY, *PROMPT, "--seed", 2**32], "must fit 32 bits"),
        (["generate", TINY, *PROMPT, "--temperature", "nan"], "temperature is nan"),
        (["generate", TINY, *PROMPT, "--dtype", "float64"], "dtype is 'float64'; use float32 or bfloat16"),
        (["generate", TINY, *PROMPT, "--dtype", STRANGE], STRANGE),
        (["generate", TINY, *PROMPT, "--chat"], "no chat template"),
        (["generate", TINY, *PROMPT, "--steer", "v.npy", "--site", "hook_zz"], "no site is named 'hook_zz'"),
        (["generate", TINY, *PROMPT, "--steer", "v.npy", "--site", "blocks.9.hook_out"], "of 4 layers"),
        (["generate", TINY, *PROMPT, "--steer", "v.npy", "--site", "blocks.1.mlp.hook_post"], "blocks.1.mlp.out.hook"),
        (["convert", TINY, "out", "--dtype", "float64"], "dtype is 'float64'"),
        (["convert", TINY, "no/out"], "no is not a directory"),
        (["convert", TINY, "."], "is not empty"),
        (["export", "absent", "out", "--dtype", "float64"], "use float32, bfloat16 or float16"),
        (["export", "absent", "out"], "absent has no converted parameters"),
        (["info", "absent", "--dtype", "float64"], "dtype is 'float64'"),
        (["parity", TINY, "--tokens", 257], "tokens is 257; the model's context has 256 tokens"),
        (["parity", TINY, "--json", "no/report.json"], "no is not a directory"),
        (["demo", "--picture", "picture.txt"], "saved as .html or .png"),
        (["sites", "--json", "--markdown"], "exclude each other"),
        (["sites", STRANGE], STRANGE),
        (["fits", "270m", "--on", "v5e-8", "--generate", 32_000], "exceeds the model's context of 32768 tokens"),
        (["fits", "270m", "--on", STRANGE], STRANGE),
    ],
)
def test_bad_arguments_are_refused_before_a_model_loads(command, tmp_path, monkeypatch, arguments, says):
    """With one line that names the thing, in either place where weights are read; nothing is written."""
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", np.ones(96, np.float32))

    def load(*arguments, **options):
        raise SystemExit("a model was loaded")

    for module in ("conversion.sources", "hooked.loading"):
        monkeypatch.setattr(f"gemma3_jax.{module}.assemble", load)
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert "JAX has removed" not in line
    assert [file.name for file in tmp_path.iterdir()] == ["v.npy"]


def test_good_arguments_load_a_model(command, tmp_path, monkeypatch):
    """The control of the test above: its way to see a load works."""
    monkeypatch.chdir(tmp_path)

    def load(*arguments, **options):
        raise SystemExit("a model was loaded")

    for module in ("conversion.sources", "hooked.loading"):
        monkeypatch.setattr(f"gemma3_jax.{module}.assemble", load)
    for arguments in (["generate", TINY, *PROMPT], ["convert", TINY, "out"], ["parity", TINY, "--tokens", 256]):
        assert command(*arguments).returncode == "a model was loaded"


@pytest.mark.parametrize("arguments", [["nonsense"], ["sites", "--nonsense"], ["generate", "--seed", "x"], ["fits"]])
def test_errors_in_the_command_line_itself(command, arguments):
    """Exit code 2, and one line."""
    done = command(*arguments)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize("arguments", [[], ["features"], ["harvest"]])
def test_no_command_prints_the_help(command, arguments):
    """And nothing else."""
    done = command(*arguments)
    assert (done.returncode, done.stderr) == (2, "")
    assert "Usage: " in done.stdout


def test_a_platform_that_is_not_there():
    """jax asserts without a message; the line names the variable, its value and the remedy."""
    arguments = [sys.executable, "-m", "gemma3_jax", "generate", "--prompt", "ba"]
    environment = {**as_users(), "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: JAX_PLATFORMS is 'cuda', and JAX finds no such device; unset JAX_PLATFORMS")


@pytest.mark.parametrize(
    ("raised", "code", "lines"),
    [
        (KeyboardInterrupt(), 130, []),
        (AssertionError(), 1, ["error: AssertionError; run gemma3-jax --traceback ... to see where"]),
        (KeyError("it has 'a' alone"), 1, ["error: it has 'a' alone"]),
        (ValueError(f"{STRANGE}\x1b[2J\nsecond"), 1, [f"error: {STRANGE}\\x1b[2J second"]),
    ],
)
def test_any_error_is_one_line(command, monkeypatch, raised, code, lines):
    """One without a message names its type, and the way to learn more; Ctrl-C has a shell's exit code and no line."""

    def fail(*arguments, **options):
        raise raised

    monkeypatch.setattr("gemma3_jax.conversion.description.describe", fail)
    done = command("info")
    assert (done.returncode, done.stderr.splitlines()) == (code, lines)


def test_sites_are_filtered(command):
    """By a part of any of their names, by a glob, and by the name of one layer; as a table, Markdown and JSON."""
    everything = json.loads(command("sites", "--json").stdout)
    assert everything == [dataclasses.asdict(row) for row in (*SITES, *HEAD_SITES)]
    wanted = {"blocks.{i}.hook_in", "blocks.{i}.hook_resid_mid", "blocks.{i}.hook_out"}
    for part in ("resid_", "*resid*", "blocks.3.hook_resid_*", "hook_resid_???*"):
        assert {row["name"] for row in json.loads(command("sites", part, "--json").stdout)} == wanted
    assert [row.name for row in rows_named("layers.0.output")] == ["blocks.{i}.hook_out"]
    assert [row.name for row in rows_named("dense_2.hook_in")] == ["dense_{j}.hook_in"]
    for form in ([], ["--markdown"]):
        shown = command("sites", "resid_mid", *form).stdout
        assert "blocks.{i}.hook_resid_mid" in shown
        assert "hook_pattern" not in shown
    with pytest.raises(UnknownSite, match=r"'hook_resid_pots'.*hook_resid_post"):
        rows_named("hook_resid_pots")


def test_names_are_printed_as_they_are(command, tmp_path, monkeypatch):
    """A path is neither markup nor emoji, and is not broken into lines: in messages, in titles and in cells."""
    monkeypatch.chdir(tmp_path)
    target = f"{STRANGE} {150 * 'x'}"
    assert command("convert", TINY, target).stdout.startswith(f"{target}: 343,584 parameters")
    assert command("info", target).stdout.count(STRANGE) == 1
    report = Report(STRANGE, "float32", (4,), STRANGE, STRANGE, ())
    table = sys.modules["gemma3_jax.cli.parity"]._table(report)
    with shared.console.capture() as printed:
        shared.console.print(table)
        shared.say(STRANGE)
    assert printed.get().count(STRANGE) == 2
    # Negative control: rich's own console reads markup.
    plain = Console(file=io.StringIO(), width=200)
    plain.print(STRANGE)
    assert STRANGE not in plain.file.getvalue()


class Terminal(io.StringIO):
    """What rich takes for a terminal."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def test_progress_is_for_terminals(command, monkeypatch):
    """What a command does is shown while it does it, and never in a file."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, file = Terminal(), io.StringIO()
    with monkeypatch.context() as patched:
        for stream in (terminal, file):
            patched.setattr(sys, "stderr", stream)
            with shared.working(f"loading {STRANGE}"):
                pass
    assert f"loading {STRANGE}" in terminal.getvalue()
    assert file.getvalue() == ""
    assert command("info").stderr == ""
