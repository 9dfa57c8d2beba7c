"""Write a checkpoint of a published size with random weights, for parity on a machine that has no real one.

python -m benchmarks.checkpoint 270m DIRECTORY
"""

import sys

import torch

from benchmarks import peers
from gemma3_jax import Gemma3Config


def write(size: str, directory: str) -> None:
    """A random Hugging Face checkpoint in float32, the same at every call, without a tokenizer."""
    torch.manual_seed(0)
    peers.hf_model(Gemma3Config.preset(size), "float32").save_pretrained(directory)


if __name__ == "__main__":
    write(*sys.argv[1:])
