"""The alternatives: Hugging Face, plain and with hooks, and other libraries if installed (`benchmarks/peers.sh`)."""

import contextlib
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
import transformers

from conversion import convert_state_dict
from gemma3_jax import Gemma3Config

OPTIONAL = ("transformer_lens", "nnsight", "gemma", "dictionary_learning")
ATTENTION = {"HF eager": "eager", "HF SDPA": "sdpa"}


def hf_model(config: Gemma3Config, dtype: str, attention: str = "sdpa") -> Any:
    """A random Hugging Face model, on the GPU if torch has one."""
    fields = {key: value for key, value in config.to_hf().items() if key not in ("model_type", "architectures")}
    hf_config = transformers.Gemma3TextConfig(**fields, attn_implementation=attention)
    model = transformers.Gemma3ForCausalLM._from_config(hf_config, dtype=getattr(torch, dtype)).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def pair(config: Gemma3Config, dtype: str, shape: tuple[int, int]) -> tuple[Any, Any, torch.Tensor, np.ndarray]:
    """A Hugging Face model, the same parameters for the port, and the same random tokens for both."""
    model = hf_model(config, dtype)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, shape)
    params = jax.tree.map(jax.numpy.asarray, convert_state_dict(model.state_dict(), config))
    return model, params, torch.from_numpy(ids).to(model.device), ids


def run_torch(model: Any, tokens: torch.Tensor, **options: Any) -> Any:
    """One forward pass; returns when it has finished."""
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False, **options).logits
        if logits.is_cuda:
            torch.cuda.synchronize()
    return np.float32(logits[0, -1, 0].item())


def with_attention(model: Any, attention: str, run: Callable[[], Any]) -> Any:
    """Run with one of Hugging Face's implementations of attention, on the same weights."""
    model.set_attn_implementation(attention)
    return run()


def forward_peers(model: Any, tokens: torch.Tensor, compiled: bool, **options: Any) -> dict[str, Callable[[], Any]]:
    """Hugging Face's forward pass with each implementation of attention, and optionally compiled."""
    peers = {
        name: functools.partial(with_attention, model, attention, lambda: run_torch(model, tokens, **options))
        for name, attention in ATTENTION.items()
    }
    if compiled:
        fast = torch.compile(model)
        peers["HF torch.compile"] = functools.partial(
            with_attention, model, "sdpa", lambda: run_torch(fast, tokens, **options)
        )
    return peers


@contextlib.contextmanager
def kept_outputs(model: Any, layers_only: bool) -> Iterator[dict[str, Any]]:
    """Forward hooks that store the output of every layer or every module, as a Hugging Face user would."""
    kept: dict[str, Any] = {}

    def hook(name: str, module: Any, args: Any, output: Any) -> None:
        kept[name] = output[0] if isinstance(output, tuple) else output

    chosen = dict(enumerate(model.model.layers)) if layers_only else dict(model.named_modules())
    handles = [module.register_forward_hook(functools.partial(hook, str(name))) for name, module in chosen.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def steered(model: Any, layer: int, vector: np.ndarray) -> Iterator[None]:
    """A forward hook that adds a vector to the output of a layer."""
    step = torch.from_numpy(vector).to(model.device, model.dtype)

    def add(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + step, *output[1:]) if isinstance(output, tuple) else output + step

    handle = model.model.layers[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def installed(package: str) -> bool:
    """Whether a peer is installed."""
    return importlib.util.find_spec(package) is not None


def bridge(model: Any) -> Any:
    """TransformerLens around a Hugging Face model."""
    from transformer_lens.model_bridge import TransformerBridge

    from gemma3_jax import TINY

    # It reads the architecture from a config file, and needs a tokenizer, which the benchmarks do not use.
    with tempfile.TemporaryDirectory() as directory:
        model.config.architectures = ["Gemma3ForCausalLM"]
        model.config.save_pretrained(directory)
        tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
        return TransformerBridge.boot_transformers(directory, hf_model=model, tokenizer=tokenizer)


def nnsight_residuals(model: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    """A run of nnsight that saves the output of every layer."""
    import nnsight

    traced = nnsight.NNsight(model)

    def run() -> Any:
        with torch.inference_mode(), traced.trace(tokens, use_cache=False):
            kept = nnsight.save([layer.output for layer in traced.model.layers])
        return np.float32(kept[-1][0].ravel()[0].item())

    return run
