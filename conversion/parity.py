"""The public names of `gemma3_jax.parity`, the comparison with Hugging Face."""

from gemma3_jax.parity import Report, Row, compare, compare_sites, parity

__all__ = ["Report", "Row", "compare", "compare_sites", "parity"]
