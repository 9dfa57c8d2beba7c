"""The files for Slurm, Kubernetes and Ray are in order, and start a harvest that the command understands."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer
import yaml

from gemma3_jax import TINY
from gemma3_jax.cli.main import app
from gemma3_jax.harvest import ActivationStore, verify
from gemma3_jax.harvest.parts import part_of

FILES = Path(__file__).parents[2] / "examples" / "harvest"


def understood(arguments):
    """What the command reads from `harvest run` and these arguments."""
    command = typer.main.get_command(app).commands["harvest"].commands["run"]
    return command.make_context("run", list(arguments)).params


def test_slurm(tmp_path):
    """The script is valid, hands its arguments on to the command, and refuses too few."""
    script = FILES / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    fake = tmp_path / "gemma3-jax"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    arguments = ["bash", str(script), "model", "corpus.jsonl", "s3://bucket/out", "blocks.{1,3}.hook_out"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == ["harvest", "run"]
    found = understood(done.stdout.splitlines()[2:])
    assert (found["out"], found["part"], list(found["site"])) == ("s3://bucket/out", "environment", arguments[-1:])
    assert subprocess.run(arguments[:-1], env=environment, capture_output=True, check=False).returncode == 2
    wanted = {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"}
    assert "--array" in script.read_text()
    assert part_of("environment", dict.fromkeys(sorted(wanted), "3") | {"SLURM_ARRAY_TASK_COUNT": "4"}) == (3, 4)


def test_kubernetes():
    """An indexed job, which tells each pod how many there are, and runs a command that exists."""
    job = yaml.safe_load((FILES / "kubernetes.yaml").read_text())["spec"]
    [container] = job["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert int(environment["JOB_COMPLETIONS"]) == job["completions"]
    assert part_of("environment", {**environment, "JOB_COMPLETION_INDEX": "1"}) == (1, job["completions"])
    assert container["command"][:3] == ["gemma3-jax", "harvest", "run"]
    assert understood(container["command"][3:])["part"] == "environment"
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_ray(tmp_path, monkeypatch, capsys):
    """All parts of a store are done. Ray itself is replaced by calls in this process, unless it is installed."""
    monkeypatch.syspath_prepend(str(FILES))
    try:
        import ray  # noqa: F401
    except ImportError:
        task = types.SimpleNamespace
        stand_in = types.SimpleNamespace(
            init=lambda: None,
            remote=lambda num_gpus, max_retries: lambda function: task(remote=function),
            get=lambda results: results,
        )
        monkeypatch.setitem(sys.modules, "ray", stand_in)
    import on_ray

    (tmp_path / "corpus.txt").write_text("ba ke lo mu\n" * 9)
    arguments = [str(TINY), str(tmp_path / "corpus.txt"), str(tmp_path / "out"), "blocks.1.hook_out", "--gpus", "0"]
    monkeypatch.setattr(sys, "argv", ["on_ray.py", *arguments])
    on_ray.main()
    verify(tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[-1] == repr(ActivationStore(tmp_path / "out")).splitlines()[0]


def test_what_the_command_does_not_understand():
    """The control: a wrong option is an error."""
    with pytest.raises(Exception, match="parts"):
        understood(["model", "corpus.txt", "out", "--site", "a", "--parts", "environment"])
