"""Activations of a corpus: many sites in one pass, on any number of machines, in files that are whole or not there."""

from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.running import harvest
from gemma3_jax.harvest.sources import JsonLines, Parquet, TextLines
from gemma3_jax.harvest.store import ActivationStore, verify

__all__ = ["ActivationStore", "JsonLines", "Parquet", "StoreError", "TextLines", "harvest", "verify"]
