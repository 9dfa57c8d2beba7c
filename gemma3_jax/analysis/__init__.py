"""Analyses of a model's weights, heads and residual stream."""

from gemma3_jax.analysis.attribution import attribution_patching, edge_attribution, integrated_gradients
from gemma3_jax.analysis.circuits import all_composition_scores, composition_scores, ov_circuit, qk_circuit
from gemma3_jax.analysis.factored import FactoredMatrix
from gemma3_jax.analysis.folding import center_unembed, fold_ln
from gemma3_jax.analysis.heads import detect_heads, detection_pattern
from gemma3_jax.analysis.lens import LogitLens, direct_logit_attribution, lens_table, logit_lens, readout
from gemma3_jax.analysis.patching import activation_patching
from gemma3_jax.analysis.paths import path_patching
from gemma3_jax.analysis.probes import Probes, probe
from gemma3_jax.analysis.prompts import PromptResult, loss_per_token, test_prompt
from gemma3_jax.analysis.sweeps import sweep

__all__ = [
    "FactoredMatrix",
    "LogitLens",
    "Probes",
    "PromptResult",
    "activation_patching",
    "all_composition_scores",
    "attribution_patching",
    "center_unembed",
    "composition_scores",
    "detect_heads",
    "detection_pattern",
    "direct_logit_attribution",
    "edge_attribution",
    "fold_ln",
    "integrated_gradients",
    "lens_table",
    "logit_lens",
    "loss_per_token",
    "ov_circuit",
    "path_patching",
    "probe",
    "qk_circuit",
    "readout",
    "sweep",
    "test_prompt",
]
