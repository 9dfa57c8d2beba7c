"""`gemma3-jax generate`: what it prints is what the library generates, piece by piece, and its errors are one line."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from gemma3_jax import TINY, HookedGemma3, edits
from tests.helpers.environment import as_users

PROMPT = "ba ke lo mu ti so re ba ke"
SITE = "blocks.1.hook_resid_post"
# One length for all, so that they share a compilation.
SHORT = ("--max-new-tokens", 8, "--dtype", "float32")


@functools.cache
def tiny():
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


@pytest.fixture
def written(command):
    """What `gemma3-jax generate` prints, called in this process."""

    def call(*arguments) -> str:
        done = command("generate", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def vector(scale=1.0):
    return np.random.default_rng(0).normal(size=tiny().config.hidden_size).astype(np.float32) * scale


def test_a_real_process(tmp_path):
    """As it is installed, with the shipped model as it is stored; what it compiles is kept for the next one."""
    command = [str(Path(sys.executable).with_name("gemma3-jax")), "generate", "--prompt", PROMPT]
    environment = {**as_users(), "JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(tmp_path)}
    options = {"capture_output": True, "text": True, "timeout": 300, "env": environment}
    done = subprocess.run([*command, "--max-new-tokens", "3"], **options)
    assert (done.returncode, done.stdout) == (0, f"{PROMPT} lo mu ti\n"), done.stderr
    assert list((tmp_path / "gemma3-jax").iterdir())


def test_it_continues_the_prompt(written):
    """Greedily, or drawn as the options say; prompt and continuation."""
    greedy = written("--prompt", PROMPT, *SHORT)
    assert greedy == tiny().generate(PROMPT, 8) + "\n"
    how = {"temperature": 3.0, "top_k": 20, "top_p": 0.9, "seed": 3}
    options = [part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", value)]
    drawn = written("--prompt", PROMPT, *SHORT, *options)
    assert drawn == tiny().generate(PROMPT, 8, **how) + "\n"
    assert drawn != greedy


def test_a_chat_prints_the_reply(written, command, tmp_path):
    """The prompt goes through the checkpoint's template as the user's turn; without a template that is the error."""
    source = shutil.copytree(TINY, tmp_path / "chatty")
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] == 'user' and 'so re ' + m['content'] }}{% endfor %}"
    (source / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}{{ ' so' }}{% endif %}")
    prompt = "so re ba ke so"
    reply = written(source, "--chat", "--prompt", "ba ke", *SHORT)
    assert f"{prompt} {reply}" == tiny().generate(prompt, 8) + "\n"
    without = command("generate", "--chat", "--prompt", "ba ke", *SHORT)
    assert without.returncode == 1
    assert "no chat template" in without.stderr


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".npy", "float32"), (".safetensors", "float32"), (".safetensors", "bfloat16")]
)
def test_it_steers(written, tmp_path, suffix, dtype):
    """With a vector of either format, at a site, as strongly as asked; by 0 it does not."""
    file = tmp_path / f"direction{suffix}"
    stored = jnp.asarray(vector(), dtype)
    if suffix == ".npy":
        np.save(file, stored)
    else:
        save_file({"direction": stored}, file)
    texts = []
    for alpha in (0.0, 20.0, -20.0):
        texts.append(written("--prompt", PROMPT, *SHORT, "--steer", file, "--site", SITE, "--alpha", alpha))
        hooks = [(SITE, edits.Add(stored, alpha))]
        assert texts[-1] == tiny().generate(PROMPT, 8, fwd_hooks=hooks) + "\n"
    assert texts[0] == tiny().generate(PROMPT, 8) + "\n"
    assert len(set(texts)) == 3


def test_each_piece_is_shown_before_the_next_is_computed(written, monkeypatch):
    """What was written so far has been flushed whenever another piece is asked for."""
    shown, waiting, seen = [], [], []

    class Terminal:
        def write(self, text):
            waiting.append(text)

        def flush(self):
            shown.extend(waiting)
            waiting.clear()

    stream = HookedGemma3.generate_stream

    def watched(*arguments, **options):
        for piece in stream(*arguments, **options):
            seen.append("".join(shown))
            yield piece

    monkeypatch.setattr(HookedGemma3, "generate_stream", watched)
    with monkeypatch.context() as terminal:
        terminal.setattr(sys, "stdout", Terminal())
        written("--prompt", PROMPT, *SHORT)
    whole = tiny().generate(PROMPT, 8)
    assert len(seen) == 8
    assert seen == [whole[: len(text)] for text in seen]
    assert [text.count(" ") for text in seen] == list(range(PROMPT.count(" "), whole.count(" ")))
    assert "".join(shown) + "".join(waiting) == whole + "\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "there is no text to continue; give --prompt"),
        (["--prompt", PROMPT, "--steer", "v.npy"], "--steer and --site belong together"),
        (["--prompt", PROMPT, "--site", SITE], "--steer and --site belong together"),
        (["--prompt", PROMPT, "--steer", "absent.npy", "--site", SITE], "there is no file absent.npy"),
        (["--prompt", PROMPT, "--steer", "v.txt", "--site", SITE], "v.txt is neither .npy nor .safetensors"),
        (["--prompt", PROMPT, "--steer", "two.safetensors", "--site", SITE], "has 2 tensors (a, b)"),
        (
            ["--prompt", PROMPT, "--steer", "text.npy", "--site", SITE],
            "text.npy has dtype <U2; a steering vector must have num",
        ),
        (["--prompt", PROMPT, "--steer", "bad.npy", "--site", SITE], "bad.npy cannot be read as .npy"),
        (["--prompt", PROMPT, "--steer", "bad.safetensors", "--site", SITE], "bad.safetensors is truncated or corrupt"),
        (["--prompt", PROMPT, "--steer", "fifo.npy", "--site", SITE], "fifo.npy is a FIFO, a socket or a device"),
        (["--prompt", PROMPT, "--steer", "fifo.safetensors", "--site", SITE], "fifo.safetensors is a FIFO, a socket"),
        (["--prompt", PROMPT, "--steer", "nan.npy", "--site", SITE], "and NaN, infinity or no values"),
        (["--prompt", PROMPT, "--steer", "v.npy", "--site", SITE, "--alpha", "nan"], "--alpha is nan"),
        (["--prompt", PROMPT, "--steer", "v.npy", "--site", SITE, "--alpha", "inf"], "--alpha is inf"),
        (["--prompt", PROMPT, "--alpha", 2], "--alpha is the factor of a steering vector"),
        (["--prompt", PROMPT, "--steer", "short.npy", "--site", SITE], "in the edit at blocks.1.hook_out"),
        (["--prompt", PROMPT, "--steer", "v.npy", "--site", "blocks.1.hook_resid_pots"], "blocks.1.hook_resid_post"),
        (["--prompt", PROMPT, "--max-new-tokens", 0], "max_new_tokens is 0"),
        (["--prompt", PROMPT, "--temperature", -1], "temperature is -1.0"),
        (["--prompt", PROMPT, "--top-k", 5], "top_k is 5, but the temperature is 0"),
        (["--prompt", PROMPT, "--top-p", 0.5, "--temperature", 0], "top_p is 0.5, but the temperature is 0"),
        # before a checkpoint is looked for
        (["/no/such/place", "--prompt", PROMPT, "--top-k", 5], "give a temperature above 0, or leave top_k out"),
        (["--prompt", PROMPT, "--dtype", "float16"], "float16 ends at 65,504; use float32 or bfloat16"),
        (["/no/such/place", "--prompt", PROMPT], "/no/such/place"),
    ],
)
def test_errors_are_one_line(command, tmp_path, monkeypatch, arguments, says):
    """On standard error, naming the thing; nothing is printed before it."""
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", vector())
    np.save("short.npy", vector()[:7])
    Path("v.txt").touch()
    save_file({"a": jnp.zeros(2), "b": jnp.zeros(2)}, "two.safetensors")
    np.save("text.npy", np.asarray(["ba"]))
    np.save("nan.npy", np.full_like(vector(), np.nan))
    for name in ("bad.npy", "bad.safetensors"):
        Path(name).write_bytes(b"no such thing")
    for name in ("fifo.npy", "fifo.safetensors"):
        os.mkfifo(name)
    done = command("generate", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line
