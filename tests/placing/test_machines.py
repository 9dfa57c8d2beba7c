"""The names of machines, and what `fits` says before it compiles anything."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import TINY, UnknownSite
from gemma3_jax.edits import Scale
from gemma3_jax.placing import fits
from gemma3_jax.placing.compiling import largest_batch
from gemma3_jax.placing.fitting import Fit, as_shapes
from gemma3_jax.placing.machines import GIB, machine, slice_names
from gemma3_jax.placing.programs import Program, bytes_per_device, collectives, needed_bytes
from gemma3_jax.reductions import At


@pytest.mark.parametrize(
    ("name", "topology", "devices"),
    [
        ("v5e-1", "v5e:1x1", 1),
        ("v5e-8", "v5e:2x4", 8),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v6e-4", "v6e:2x2", 4),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v4-16", "v4:2x2x2", 8),
        ("v3-8", "v3:2x2", 8),
        ("h100", "1x1x1", 1),
        ("H100x8", "1x1x8", 8),
        ("a100x32", "1x4x8", 32),
    ],
)
def test_names_of_machines(name, topology, devices):
    """A slice of v4 and v5p is named by cores, two on each chip; GPUs beyond eight are on several hosts."""
    found = machine(name)
    assert (found.topology, found.devices) == (topology, devices)


@pytest.mark.parametrize("name", ["v5e-9", "v5e", "tpu", "h100x9", "h100x0", "a100x", "xh100", "", "v7-8"])
def test_a_wrong_name_lists_the_machines(name):
    """The error has all names to choose from."""
    with pytest.raises(ValueError, match="there is no machine") as raised:
        machine(name)
    assert all(each in str(raised.value) for each in (*slice_names(), "h100x8", "a100-40gb"))


def test_the_limit_of_a_gpu_follows_the_share_that_jax_takes(monkeypatch):
    """As JAX reads it from the environment."""
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(variable, raising=False)
    whole = machine("h100").limit / 0.75
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert machine("h100").limit == pytest.approx(whole / 2)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (22.93G) "
            "exceeds available HBM (15.75G).",
            22.93,
        ),
        ("Ran out of memory in memory space hbm. Used 16.63G of 15.75G hbm. Exceeded hbm capacity by 900.2M.", 16.63),
        ("the total memory required for HLO temporaries (512.00M) exceeds available HBM (1.00K)", 0.5),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_the_figures_of_a_refusal(message, gib):
    """Both messages of the TPU compiler, in any unit; none in a message without figures."""
    needed = needed_bytes(message)
    assert needed == (None if gib is None else pytest.approx(gib * GIB))


def test_collectives_are_counted_by_kind_and_shape():
    """Started operations count once, the end of one does not, and a tuple shows all of its results."""
    text = """
      %a = bf16[8,16]{1,0:T(8,128)} all-reduce(%x), channel_id=1
      %b = f32[8,16]{1,0} all-reduce-start(%x), channel_id=2
      %c = f32[8,16]{1,0} all-reduce-done(%b)
      %d = f32[8,16]{1,0} all-reduce(%all-reduce.1), channel_id=3
      %e = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), channel_id=4
      %f = (f32[2]{0}, bf16[3]{0}) all-reduce-start(%x, %y), channel_id=5
      %g = f32[8,16]{1,0} fusion(%all-gather.1), kind=kLoop
    """
    assert collectives(text) == {
        "all-gather f32[8]": 1,
        "all-reduce bf16[8,16]": 1,
        "all-reduce f32[2] bf16[3]": 1,
        "all-reduce f32[8,16]": 2,
    }


@pytest.mark.parametrize("true", [0, 1, 5, 37, 1000])
@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("figures", [True, False])
def test_the_largest_batch(true, step, figures):
    """It fits, and one that is larger by a step or a sixteenth does not; fast with figures, and right without them."""
    tried = []

    def needed(batch):
        tried.append(batch)
        good = batch <= true
        return good, 1000 + 10 * batch if good or figures else None

    found = largest_batch(needed, 8, step, 1000, 1000 + 10 * true + 5)
    assert found <= true
    assert len(tried) <= 6
    assert all(batch % step == 0 for batch in tried)
    if figures:
        assert true - found < max(step, found // 16 + 1)


def test_no_batch_fits_if_the_weights_do_not():
    """Without a compilation."""
    assert largest_batch(lambda batch: pytest.fail("compiled"), 8, 1, 1000, 999) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on": "v5e-8", "model": 3}, "does not divide the 8 devices"),
        ({"on": "v5e-8", "model": 0}, "model is 0"),
        ({"on": "v5e-8", "batch": True}, "batch is True"),
        ({"on": "v5e-8", "generate": -1}, "generate is -1"),
        ({"on": "v5e-8", "dtype": "float16"}, "float16"),
        ({"on": "v5e-8", "gradients": "both"}, "gradients is 'both'"),
        ({"on": "v5e-8", "gradients": "params", "generate": 4}, "None with generate"),
        ({"on": "v5e-8", "gradients": "sites"}, "name them in capture"),
        ({"on": "v5e-8", "return_type": None}, "name them in capture"),
        ({"on": "v5e-8", "return_type": "logit"}, "return_type is 'logit'"),
        ({"on": "v5e-8", "return_type": None, "generate": 4}, "leave it out with generate"),
        ({"on": "v5e-8", "return_type": "loss", "gradients": "params"}, "leave it out with generate and gradients"),
        ({"on": "v5e-8", "generate": 4, "capture": {"blocks.*.hook_out": At(0)}}, "whole values are needed"),
        ({"on": "v5e-8", "length": 4, "capture": {"blocks.*.hook_out": At(9)}}, "positions has 9"),
    ],
    ids=str,
)
def test_wrong_arguments(options, message):
    """Each is an error before a process starts."""
    with pytest.raises(ValueError, match=message):
        fits("1b", **options)


def test_wrong_sites():
    """Names are resolved before a process starts."""
    with pytest.raises(UnknownSite):
        fits("1b", on="v5e-8", capture="blocks.*.hook_resid_pots")
    with pytest.raises(UnknownSite):
        fits("1b", on="v5e-8", edits={"blocks.*.hook_resid_pots": Scale(2.0)})


@pytest.mark.parametrize("argument", ["capture", "edits"])
def test_functions_that_cannot_be_sent(argument):
    """The message says where to define them."""
    with pytest.raises(ValueError, match="at the top level of a module"):
        fits("1b", on="v5e-8", **{argument: {"blocks.3.hook_out": lambda x, hook: x}})


def test_arrays_of_reductions_and_edits():
    """A large array is sent as a shape, once for each array; abstract arrays count each time that they occur."""
    W, abstract = jnp.ones((1024, 1024)), jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    found = as_shapes({"a": [W, W], "b": (abstract, abstract), "c": np.arange(3), "name": "blocks.0.hook_out"})
    assert {type(leaf) for leaf in jax.tree.leaves((found["a"], found["b"]))} == {jax.ShapeDtypeStruct}
    assert found["a"][0] is found["a"][1]
    assert found["b"][0] is not found["b"][1]
    assert (found["c"].tolist(), found["name"]) == ([0, 1, 2], "blocks.0.hook_out")
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one) for leaf in found["b"]]
    assert bytes_per_device((placed, placed, "blocks.0.hook_out")) == 2 * W.nbytes


@pytest.mark.parametrize(("on", "extra"), [("v5e-8", "tpu"), ("h100", "gpu-compiler")])
def test_a_missing_compiler_names_the_command(on, extra, monkeypatch):
    """The line to type, for each platform."""
    find = importlib.util.find_spec
    without = ("libtpu", "jax_plugins")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.partition(".")[0] in without else find(name)
    )
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'gemma3-jax\[{extra}\]'"):
        fits(TINY, on=on)


@pytest.fixture
def program():
    return Program("forward", 100, False, {"all-reduce f32[2]": 2})


@pytest.mark.parametrize(("limit", "refused", "expected"), [(100, False, True), (99, False, False), (100, True, False)])
def test_what_fits(limit, refused, expected, program):
    """A GPU's compiler refuses nothing: the peak decides; a refused program never fits."""
    programs = (program, dataclasses.replace(program, name="decode", peak=50, refused=refused))
    report = Fit("h100", {"data": 1, "model": 1}, 1, 10, 0, limit, programs, None)
    assert (report.fits, report.peak) == (expected, 100)
    assert report.collectives == {"all-reduce f32[2]": 4}


def test_the_command_checks_its_arguments(command):
    """Exit code 1 and one line, as other commands."""
    done = command("fits", "1b", "--on", "v5e-9")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no machine 'v5e-9'; TPU slices are v2-8")
    assert command("fits", "1b").returncode == 2


def test_the_command_prints_a_report(command, monkeypatch, program):
    """The figures, and exit code 1 if the run does not fit."""
    from gemma3_jax import placing

    for limit, code, words in ((2**30, 0, "8 rows: fits. The largest batch that fits: 36."), (99, 1, "does NOT fit")):
        report = Fit("h100x2", {"data": 1, "model": 2}, 8, 2**29, 2**28, limit, (program,), 36)
        monkeypatch.setattr(placing, "fits", lambda *_, report=report, **__: report)
        done = command("fits", "1b", "--on", "h100x2", "--model", "2", "--batch", "8")
        assert done.returncode == code
        assert words in done.stdout
        assert "all-reduce f32[2]" in done.stdout
        assert "0.50" in done.stdout
        assert re.search(r"reductions and edits\W+0\.25", done.stdout)
