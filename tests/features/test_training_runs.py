"""Training that was killed goes on with the same bits; Matryoshka dictionaries; cross-layer transcoders."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import features
from gemma3_jax.reading import CheckpointError
from tests.features.test_training import SITE, D, F, K, codes, directions, found, fvu

READS, WRITES = [[f"blocks.{i}.{name}.hook_out" for i in range(2)] for name in ("ln2", "ln2_post")]
ROOT = Path(__file__).parents[2]
# The process kills itself when it reads a batch, after the first 4,096 tokens, which are read before the first step.
KILLED = """
import os, signal, sys
from tests.features.test_training_runs import run, two_passes

def until(last):
    for i, batch in enumerate(two_passes()):
        if i == last:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

run(until(int(sys.argv[1])), sys.argv[2])
"""


def two_passes():
    """20 batches of 256."""
    x = (codes(2560) @ directions()).astype(np.float32)
    return [*x.reshape(10, 256, D), *x.reshape(10, 256, D)]


def run(activations, file=None, **more):
    """A short run, which is kept every 3 steps."""
    given = {"k": K, "site_in": SITE, "steps": 20, "checkpoint": file, "checkpoint_every": 3} | more
    return features.train(activations, F, **given)


def same(one, other):
    """Whether all arrays are equal, bit for bit."""
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_a_killed_run_goes_on(tmp_path):
    """With SIGKILL, and then resumed, it gives the bits of an undisturbed run; and a finished one is not run again."""
    file = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "18", str(file)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert file.exists()
    steps = []
    undisturbed = run(two_passes())
    resumed = run(two_passes(), file, report=lambda each: steps.append(each.step))
    assert same(resumed, undisturbed)
    assert not same(run(two_passes(), steps=19), undisturbed)  # control
    assert same(run(two_passes(), file, report=lambda each: steps.append(each.step)), undisturbed)
    assert steps == [20]


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_arrays_go_on_in_a_later_pass(kind, tmp_path):
    """The order of the second pass continues where the first process stopped; every kind's state is kept."""
    x, given = codes(600) @ directions(), {"kind": kind, "batch": 256, "steps": 54}

    def interrupt(figures):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(x, tmp_path / "run", **given, report=interrupt)
    assert same(run(x, tmp_path / "run", **given), run(x, **given))


def test_another_run_is_refused(tmp_path):
    """The message names what differs; a file that is not a run is refused, too."""
    file, batches = tmp_path / "run", two_passes()
    run(batches, file)
    others = {
        "k is 3, and was 2": {"k": 3},
        "kind is topk, and was batchtopk": {"kind": "topk"},
        "steps is 15, and was 20": {"steps": 15},
        "seed is": {"seed": 1},
        "learning_rate is": {"learning_rate": 1e-3},
        "site_in is": {"site_in": "blocks.1.hook_out"},
        "batch is": {"batch": 32},
        "prefixes is": {"prefixes": [4]},
    }
    before = file.read_bytes()
    for message, more in others.items():
        with pytest.raises(CheckpointError, match=f"another training run: .*{message}"):
            run(batches, file, **more)
    with pytest.raises(CheckpointError, match=r"another training run: activations is .*Give the same arguments"):
        run(batches[::-1], file)
    assert file.read_bytes() == before
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not the state of a training run, or is damaged"):
        run(batches, file)


def test_a_matryoshka():
    """The first features alone explain more than those of a plain dictionary do; all of them find the directions."""
    x = (codes() @ directions()).astype(np.float32)
    given = {"k": K, "site_in": SITE, "batch": 128, "steps": 500}
    plain, nested = features.train(x, F, **given), features.train(x, F, **given, prefixes=(4, 12))

    def explained(sae, first):
        f = np.array(sae.encode(x))
        f[:, first:] = 0
        return fvu(x, sae.decode(f))

    assert explained(nested, 4) < explained(plain, 4) - 0.05
    assert explained(nested, 12) < explained(plain, 12)
    assert found(nested.W_dec, directions()) > 0.85
    for prefixes in ((4, 4), (0, 4), (4, F + 1)):
        with pytest.raises(ValueError, match=f"at most the width, {F}"):
            features.train(x, F, **given, prefixes=prefixes)


def across_layers(n=4096):
    """Inputs and outputs [2, n, d] of two layers; the second output is written by features of both."""
    first, second = codes(n), codes(n, seed=8)
    x = 3 + np.stack([first @ directions(), 20 * second @ directions(seed=5)])
    y = np.stack([first @ directions(seed=2), 50 * (first @ directions(seed=3) + second @ directions(seed=6))]) - 7
    return x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_a_cross_layer_transcoder(kind, tmp_path):
    """What earlier layers write is found, in raw units; one that may not write to later layers explains less."""
    x, y = across_layers()
    history = []
    given = {"k": K, "site_in": READS, "site_out": WRITES, "batch": 128, "steps": 700}
    clt = features.train((x, y), F, kind, **given, report=history.append)
    assert isinstance(clt, features.CrossLayerTranscoder)
    assert (clt.site_in, clt.site_out) == (tuple(READS), tuple(WRITES))
    errors = [fvu(*each) for each in zip(y, clt(x), strict=True)]
    assert max(errors) < 0.3
    assert sum(errors) / 2 == pytest.approx(history[-1].fvu, rel=0.4)
    assert found(np.asarray(clt.W_dec[0])[:, 1], directions(seed=3)) > 0.85
    own = (*clt.W_dec[:1], clt.W_dec[1])
    alone = clt.replace(W_dec=(own[0].at[:, 1].set(0), own[1]))
    assert fvu(y[1], alone(x)[1]) > 0.4  # control
    features.save(clt, tmp_path / "clt")
    np.testing.assert_allclose(features.load(tmp_path / "clt")(x), clt(x), rtol=1e-4, atol=1e-2)


def test_sites_of_several_layers():
    """From globs and batches of pairs; wrong names and shapes are refused."""
    x, y = across_layers(256)
    given = {"k": K, "batch": 128, "steps": 2}
    globs = {"site_in": "blocks.*.ln2.hook_out", "site_out": "blocks.*.hook_mlp_out"}
    wanted = features.train(
        [(x[:, :128], y[:, :128]), (x[:, 128:], y[:, 128:])], F, site_in=READS, site_out=WRITES, **given
    )
    assert wanted.site_out == features.train((x, y), F, **globs, **given).site_out == tuple(WRITES)
    ragged = [(x[:, :100], y[:, :100]), (jnp.asarray(x[:, 100:]), y[:, 100:])]
    again = features.train(ragged, F, site_in=READS, site_out=WRITES, **given)
    np.testing.assert_array_equal(again.W_dec[0], wanted.W_dec[0])
    wrong = [
        ((x, y), READS, None, "cross-layer transcoder reads and writes"),
        ((x, y), READS, WRITES[:1], "names 2 sites, and site_out 1"),
        ((x, y), READS[::-1], WRITES, "in their order"),
        ((x[0], y[0]), READS, WRITES, r"\[2, n, d\]"),
        ((x[:1], y[:1]), READS, WRITES, "for 2 layers"),
        ([(x, y)], globs["site_in"], globs["site_out"], "list of names"),
    ]
    for activations, site_in, site_out, message in wrong:
        with pytest.raises(ValueError, match=message):
            features.train(activations, F, site_in=site_in, site_out=site_out, **given)
