"""Generation: the KV cache, the prefill, the decode loop, sampling."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from gemma3_jax.generation.loop import Generation, generate

__all__ = ["Generation", "generate"]
