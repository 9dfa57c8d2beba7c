"""Every size compiles for TPUs and GPUs that are not there, and takes the memory that docs/devices.md states.

Each test compiles in a process of its own. `.ci/run` installs the compilers and runs these tests; elsewhere they are
skipped. Times are not checked.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from gemma3_jax import Gemma3Config, features
from gemma3_jax.config import PRESETS
from gemma3_jax.placing import fits
from gemma3_jax.placing.fitting import check_compiler
from gemma3_jax.placing.machines import GIB, machine
from tests.helpers.environment import as_users

TPU = pytest.param("v5e-8", marks=pytest.mark.tpu_compiler)
GPU = pytest.param("h100x8", marks=pytest.mark.gpu_compiler)
RESIDUALS = "blocks.*.hook_resid_post"


@pytest.fixture(autouse=True)
def compilers(request, monkeypatch):
    """Skip a test whose compiler is not installed, with the command that installs it. Their XLA has its own flags."""
    monkeypatch.setenv("XLA_FLAGS", as_users()["XLA_FLAGS"])
    name = "v5e-8" if request.node.get_closest_marker("tpu_compiler") else "h100"
    try:
        check_compiler(machine(name))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def check_collectives(collectives, *residual):
    """Only all-reduces carry whole residual streams [b, p, d], as bfloat16 or float32; the others are small."""
    shape = f"[{','.join(map(str, residual))}]"
    short = f"[{','.join(str(size) for size in residual if size > 1)}]"
    large = {name for name in collectives if shape in name or short in name}
    assert large
    assert all(name.startswith("all-reduce") for name in large)
    assert not any(str(residual[-1]) in name for name in set(collectives) - large)


def check_captures(size, on, length):
    """The program has all residual streams as outputs, and all-reduces of the residual stream alone."""
    report = fits(size, on, model=8, batch=8, length=length, capture=RESIDUALS, largest_batch=False)
    assert report.fits
    assert report.weights < report.peak < report.limit
    check_collectives(report.collectives, 8, length, PRESETS[size].hidden_size)
    # Two in the body of the scan and one for the embedding; without that of attention if its heads are whole.
    assert sum(report.collectives.values()) == (3 if PRESETS[size].num_attention_heads % 8 == 0 else 2)
    return report


@pytest.mark.parametrize("on", [TPU, GPU])
@pytest.mark.parametrize("size", [size for size in PRESETS if size != "27b"])
def test_forward_with_captures(size, on):
    """Of 256 tokens, but for 27b, which is below."""
    check_captures(size, on, 256)


@pytest.mark.parametrize("on", [TPU, GPU])
@pytest.mark.parametrize("size", PRESETS)
def test_gradients(size, on):
    """Of the loss at all residual streams: the backward pass keeps what every layer computed, so the batch is small."""
    report = fits(size, on, model=8, length=128, capture=RESIDUALS, gradients="sites", largest_batch=False)
    assert report.fits
    assert [program.name for program in report.programs] == ["gradients"]


@pytest.mark.parametrize("on", [TPU, GPU])
@pytest.mark.parametrize("size", PRESETS)
def test_decode(size, on):
    """The prefill and the decode loop, which do not scan: of one layer of each kind, which the others repeat."""
    whole = PRESETS[size]
    kinds = tuple(sorted(set(whole.layer_types), reverse=True))
    assert kinds == ("sliding_attention", "full_attention")
    config = dataclasses.replace(whole, num_hidden_layers=2, layer_types=kinds)
    report = fits(config, on, model=8, batch=8, length=64, generate=8, largest_batch=False)
    assert report.fits
    prefill, decode = report.programs
    check_collectives(prefill.collectives, 8, 64, config.hidden_size)
    check_collectives(decode.collectives, 8, 1, config.hidden_size)


@pytest.mark.tpu_compiler
def test_27b_fits_a_slice_of_eight():
    """One row: the figures of docs/devices.md."""
    report = fits("27b", "v5e-8", model=8, largest_batch=False)
    assert report.fits
    assert report.weights <= 6.4 * GIB
    assert report.peak <= 6.6 * GIB


@pytest.mark.gpu_compiler
def test_27b_with_all_residual_streams_on_gpus():
    """The figures of docs/devices.md."""
    report = check_captures("27b", "h100x8", 1024)
    assert report.peak <= 9 * GIB


@pytest.mark.tpu_compiler
def test_27b_with_all_residual_streams():
    """Eight rows of 1,024 tokens fit because each chip keeps an eighth of what is captured."""
    report = check_captures("27b", "v5e-8", 1024)
    assert report.peak <= 8.5 * GIB
    assert report.collectives == {"all-reduce bf16[8,1024,5376]": 3}


def transcoder(layer, width):
    """Of 4b, as Gemma Scope has them, in bfloat16."""
    d = PRESETS["4b"].hidden_size
    return features.Transcoder(
        W_enc=jnp.zeros((d, width), jnp.bfloat16),
        b_enc=jnp.zeros(width),
        W_dec=jnp.zeros((width, d), jnp.bfloat16),
        b_dec=jnp.zeros(d),
        activation=features.JumpRelu(jnp.zeros(width)),
        site_in=f"blocks.{layer}.ln2.hook_out",
        site_out=f"blocks.{layer}.ln2_post.hook_out",
    )


def abstract_transcoders(layers, width):
    """Shapes alone: the real ones take 91 GB."""
    return [jax.eval_shape(functools.partial(transcoder, layer, width)) for layer in range(layers)]


@pytest.mark.tpu_compiler
def test_wide_transcoders_on_every_layer_of_4b():
    """262,144 features replace the output of each MLP: an eighth of each dictionary on each chip, one sum for each."""
    spliced = [features.splice(each, error=False) for each in abstract_transcoders(34, 262_144)]
    report = fits("4b", "v5e-8", model=8, batch=8, length=1024, edits=spliced, largest_batch=False)
    assert report.fits
    assert report.added == pytest.approx(10.63 * GIB, rel=0.001)
    assert report.weights + report.added < report.peak <= 13.4 * GIB
    assert report.collectives == {"all-reduce bf16[8,1024,2560]": 3, "all-reduce f32[8,1024,2560]": 34}


@pytest.mark.tpu_compiler
def test_features_as_a_reduction():
    """Decoders, which no program reads, count too: they are in the device's memory. Four chips hold a quarter each."""
    config = dataclasses.replace(PRESETS["4b"], num_hidden_layers=1, layer_types=())
    (one,) = abstract_transcoders(1, 65_536)
    encoded = {one.site_in: features.Encode(one, k=64)}
    shape = {"model": 4, "length": 16, "return_type": None, "largest_batch": False}
    report = fits(config, "v5e-4", capture=encoded, **shape)
    assert report.added == pytest.approx(2 * 2560 * 65_536 * 2 / 4, rel=0.01)
    assert report.peak > report.weights + report.added
    assert fits(config, "v5e-4", capture=one.site_in, **shape).added == 0  # control


@pytest.mark.tpu_compiler
def test_12b_does_not_fit_one_chip():
    """The compiler refuses the program, and the report has its figures. No other batch is tried."""
    report = fits("12b", "v5e-1")
    assert not report.fits
    assert report.programs[0].refused
    assert report.peak == pytest.approx(22.93 * GIB, rel=0.01)
    assert report.weights == pytest.approx(21.92 * GIB, rel=0.01)
    assert report.largest_batch == 0


@pytest.mark.tpu_compiler
def test_the_largest_batch_is_searched():
    """A negative control beside it: the next batch does not fit."""
    config = dataclasses.replace(Gemma3Config.preset("270m"), num_hidden_layers=1, layer_types=())
    most = fits(config, "v5e-1", length=4096, batch=2).largest_batch
    assert most > 0
    assert not fits(config, "v5e-1", length=4096, batch=most + max(1, most // 16), largest_batch=False).fits


@pytest.mark.gpu_compiler
def test_27b_fits_one_gpu():
    """In the share of it that JAX takes by default."""
    report = fits("27b", "h100", largest_batch=False)
    assert report.fits
    assert report.weights == pytest.approx(50.31 * GIB, rel=0.01)
    assert report.peak <= 52.5 * GIB
    assert report.collectives == {}


@pytest.mark.gpu_compiler
def test_a_gpu_has_a_limit_too():
    """Its compiler refuses nothing; the peak is compared with what JAX takes of the card."""
    report = fits("12b", "a100-40gb", batch=64, length=1024, largest_batch=False)
    assert not report.fits
    assert report.peak > report.limit
