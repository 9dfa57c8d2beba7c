"""Loading takes the memory of its result, of its largest tensor, and little more."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import flax.traverse_util
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from conversion import save_params
from gemma3_jax import Gemma3Config
from gemma3_jax.conversion.gemma3 import entries
from tests.helpers.environment import as_users

MB = 1_000_000
ALLOWANCE, ALLOWANCE_OF_PARTS = 300 * MB, 100 * MB
# The embedding and the head are 330 MB each in bfloat16: one copy of either too many is more than the allowance.
CONFIG = Gemma3Config(
    vocab_size=161_000,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    sliding_window=512,
    query_pre_attn_scalar=256,
    tie_word_embeddings=False,
)

# In a process of its own, from a fresh exec: a peak is inherited across fork.
CHILD = """
import json, sys
import jax, jax.numpy as jnp
import orbax.checkpoint, tensorstore  # imported when parameters are loaded
import conversion
from gemma3_jax import Gemma3Config
from gemma3_jax.placing import make_mesh, param_shardings

def memory(name):
    [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024

jnp.zeros(1).block_until_ready()
config = Gemma3Config.from_hf(json.load(open(sys.argv[1] + "/config.json")))
mesh = make_mesh(model=jax.device_count())
shardings = param_shardings(config, mesh) if mesh.size > 1 else None
base = memory("VmRSS")
config, params = getattr(conversion, sys.argv[3])(sys.argv[1], dtype=json.loads(sys.argv[2]), shardings=shardings)
jax.block_until_ready(params)
parts = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
print(json.dumps({"base": base, "peak": memory("VmHWM"), "params": sum(parts), "largest part": max(parts)}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """About 700 MB of bfloat16, one shard a tensor; the head repeats the embedding, so that it suits a tied config."""
    directory = tmp_path_factory.mktemp("large")
    block = np.random.default_rng(0).standard_normal(2**16, dtype=np.float32).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for i, entry in enumerate(entries(CONFIG)):
        key = entry.hf if entry.hf == "lm_head.weight" else f"model.{entry.hf}"
        weight_map[key] = f"model-{i:05}.safetensors"
        save_file({key: np.resize(block, entry.hf_shape)}, directory / weight_map[key])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def measured(checkpoint: Path, *, tied: bool, dtype: str | None, devices: int = 1) -> dict[str, int]:
    """Bytes before the conversion, at its peak, and of its result, in a process with so many devices."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    (checkpoint / "config.json").write_text(json.dumps(config.to_hf()))
    return in_a_process("convert_checkpoint", checkpoint, dtype, devices)


def in_a_process(function: str, directory: Path, dtype: str | None, devices: int) -> dict[str, int]:
    """What `measured` returns, for a function that loads a directory."""
    command = [sys.executable, "-c", CHILD, str(directory), json.dumps(dtype), function]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**as_users(), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["peak"] - seen["base"] > 0.9 * seen["params"], "the measure does not see the parameters"
    return seen


def figures(seen: dict[str, int]) -> str:
    """For a failed test."""
    return ", ".join(f"{name} {size / MB:.0f} MB" for name, size in seen.items())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(("tied", "dtype"), [(True, None), (False, None), (False, "float32")])
def test_peak_memory(tied, dtype, checkpoint):
    """Peak memory is at most what the process had, the parameters, the largest stored tensor, and 300 MB."""
    seen = measured(checkpoint, tied=tied, dtype=dtype)
    largest = 2 * CONFIG.vocab_size * CONFIG.hidden_size
    assert seen["peak"] - seen["base"] - seen["params"] - largest <= ALLOWANCE, figures(seen)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_peak_memory_of_parts(checkpoint):
    """On eight devices, it is what they hold, one part of the largest parameter, and 100 MB: less than a whole one."""
    seen = measured(checkpoint, tied=False, dtype=None, devices=8)
    assert 8 * seen["largest part"] == 2 * CONFIG.vocab_size * CONFIG.hidden_size
    assert seen["peak"] - seen["base"] - seen["params"] - seen["largest part"] <= ALLOWANCE_OF_PARTS, figures(seen)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_peak_memory_of_saved_parameters(tmp_path):
    """Loading them is no different; reading several arrays at once, as Orbax does, takes 145 MB or more too many."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    kinds = {1: np.float32}  # of norms
    params = {
        entry.path: np.zeros(entry.shape, kinds.get(len(entry.shape), ml_dtypes.bfloat16)) for entry in entries(config)
    }
    save_params(config, flax.traverse_util.unflatten_dict(params), tmp_path / "saved")
    seen = in_a_process("load_params", tmp_path / "saved", None, devices=8)
    assert 8 * seen["largest part"] == 2 * config.vocab_size * config.hidden_size
    assert seen["peak"] - seen["base"] - seen["params"] - seen["largest part"] <= ALLOWANCE_OF_PARTS, figures(seen)
