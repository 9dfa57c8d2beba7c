"""The command line as its users meet it: its output, its exit codes, the files it leaves.

One real process of each sort: the demo and parity, whose code is compiled as users run it, an error, a listing, and
`generate` beside its other tests. The others call the command in this process.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gemma3_jax
from conversion import convert_checkpoint
from gemma3_jax import TINY, HookedGemma3
from gemma3_jax.cli.demo import half_losses, induction_scores, repeated_tokens
from tests.helpers.environment import as_users
from tests.helpers.random_models import hf_model

COMMAND = str(Path(sys.executable).with_name("gemma3-jax"))


def run(*arguments, cwd=None) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 300, "cwd": cwd, "env": as_users()}
    return subprocess.run([COMMAND, *map(str, arguments)], **options)


def test_demo(tmp_path):
    """The first thing that a newcomer runs: parity, copying, induction heads and a picture."""
    done = run("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "equal to Hugging Face" in done.stdout
    assert "NOT equal" not in done.stdout
    assert "Induction heads" in done.stdout
    assert (tmp_path / "induction.png").read_bytes().startswith(b"\x89PNG")


def test_convert_then_export_is_the_checkpoint_again(tmp_path, command):
    """The last file has the tensors of the first one, bit for bit."""
    from safetensors.numpy import load_file

    hf_model().save_pretrained(tmp_path / "hf")
    assert command("convert", tmp_path / "hf", tmp_path / "port").returncode == 0
    assert command("export", tmp_path / "port", tmp_path / "back").returncode == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()
    for key in before:
        bound = 2**-24 if "norm" in key else 0
        assert np.max(np.abs(before[key] - after[key])) <= bound * max(1, np.max(np.abs(1 + before[key])))
    model = HookedGemma3.from_pretrained(tmp_path / "port")
    assert model.config == convert_checkpoint(tmp_path / "hf")[0]


def test_parity_writes_its_report(tmp_path):
    """A table for people, JSON for machines, exit code 0: in a process of its own, which optimises as users' do."""
    done = run("parity", TINY, "--tokens", 20, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert report["tokens"] == [20]
    assert all(row["kind"] in done.stdout for row in report["rows"])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["info", "/no/such/place"], "/no/such/place"),
        (["convert", TINY, TINY], "not empty"),
        (["export", TINY, "somewhere"], "no converted parameters"),
        (["parity", TINY, "--dtype", "float64"], "float64"),
        (["parity", TINY, "--tokens", "0"], "tokens"),
        (["demo", "--picture", "/no/such/place/x.png"], "/no/such/place"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_are_one_line(arguments, names, tmp_path, monkeypatch, command):
    """Exit code 1, one line on standard error that names the thing, and no traceback."""
    monkeypatch.chdir(tmp_path)
    done = command(*arguments)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert names in errors[0]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_version(command):
    """It is that of the package."""
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"gemma3-jax {gemma3_jax.__version__}\n")


def test_an_error_of_a_real_process():
    """One line; and `--traceback` shows where it came from."""
    done = run("info", "/no/such/place")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "/no/such/place" in line
    done = run("--traceback", "info", "/no/such/place")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_sites_and_info(command):
    """Both list what they are about, the first in a real process."""
    sites = run("sites")
    assert "blocks.{i}.attn.hook_pattern" in sites.stdout
    info = command("info")
    assert "sliding_attention" in info.stdout
    assert "BF16" in info.stdout


def test_the_shipped_model_copies():
    """It is trained: no loss on repetitions, chance level on what comes first; local layers have no induction heads."""
    model = HookedGemma3.from_pretrained(TINY)
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 1.5e6
    tokens = repeated_tokens(model, rows=8, half=24)
    first, repeated = half_losses(model, tokens)
    assert repeated < 0.1
    assert first > np.log(100) - 0.2
    scores = induction_scores(model, tokens)
    full = np.array(model.config.layer_types) == "full_attention"
    assert scores[full].max() > 0.5
    assert scores[~full].max() < 0.1
    # Negative control: on sequences that do not repeat, nothing is to be copied.
    rng = np.random.default_rng(1)
    unrepeated = np.where(np.arange(tokens.shape[1]) < 25, tokens, rng.integers(4, 104, tokens.shape))
    assert half_losses(model, unrepeated)[1] > 3
    assert induction_scores(model, unrepeated).max() < 0.3


def test_transformers_loads_the_shipped_model():
    """The directory is an ordinary checkpoint with its tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    model = transformers.Gemma3ForCausalLM.from_pretrained(TINY)
    ids = tokenizer("ba ke lo mu ti so re na du pi ba ke lo", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1:].argmax(-1)) == "mu"
