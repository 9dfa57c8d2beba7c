"""Results of everything that a model does, as NumPy arrays, to compare one device with a mesh of devices."""

from typing import Any

import jax
import numpy as np

from gemma3_jax import TINY, HookedGemma3, analysis, edits, reductions
from gemma3_jax.processes import to_host

CORRUPTED, CLEAN = "ba ke ti so ba ke", "ba ke lo mu ba ke"
TEXTS = ["ba ke lo mu ti so re ba ke", "ba ke", "lo mu ti"]


def two_layers(**arguments) -> HookedGemma3:
    """The embedded model's first two layers, with logits."""
    return HookedGemma3.from_pretrained(
        TINY, dtype="float32", first_n_layers=2, allow_truncated_logits=True, **arguments
    )


def everything(model: HookedGemma3) -> dict[str, np.ndarray]:
    """By name, the results of runs, edits, gradients, generation, the analyses and the methods of caches."""
    return on_host({**runs(model), **generated(model), **analyses(model)})


def on_host(results: dict[str, Any]) -> dict[str, np.ndarray]:
    """Each array by its path, whole in every process."""
    return {jax.tree_util.keystr(path): to_host(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(results)}


def runs(model):
    """Three rows, which "data" of 2, 4 or 8 devices does not divide."""
    logits, cache = model.run_with_cache(TEXTS)
    loss, grads = model.run_with_cache(TEXTS, "blocks.*.hook_resid_post", incl_bwd=True)
    coefficient = 3.0
    hooks = [
        ("blocks.0.attn.hook_z", edits.only(edits.Replace(0.0), heads=1)),
        ("blocks.1.hook_resid_post", lambda value, hook: value * coefficient),
    ]
    reduced = {"blocks.*.hook_resid_post": reductions.At(-1), "blocks.1.attn.hook_pattern": lambda v, hook: v.max(-1)}
    batches = model.activations([TEXTS, TEXTS[:1]], "blocks.*.hook_resid_post", whole=True)
    return {
        "logits": logits,
        "sites": dict(cache),
        "loss": loss,
        "gradients": dict(grads.grads),
        "edited": model.run_with_hooks(TEXTS, hooks),
        "reduced": dict(model.run_with_cache(TEXTS, reduced)[1]),
        "last logits": model(TEXTS, logits_at=-1),
        "activations": [dict(batch) for batch in batches],
        "heads": cache.stack_head_results(layer=1, apply_ln=True),
        "parts": cache.decompose_resid(),
        "real": cache.real("blocks.1.hook_resid_post"),
        "directions": model.tokens_to_residual_directions([3, 4]),
        "W_Q": model.W_Q,
    }


def generated(model):
    steer = [("blocks.1.hook_resid_post", lambda value, hook: value * 1.5)]
    text, generation = model.generate(
        TEXTS, max_new_tokens=8, fwd_hooks=steer, names_filter="blocks.*.hook_resid_post", return_logits=True
    )
    sampled = model.generate(TEXTS, 8, temperature=1.0, top_k=20, seed=3, return_type="tokens")
    stopped = model.generate(TEXTS, 8, stop_strings=["mu"], stop_at_eos=False)
    return {
        "texts": [list(each.encode()) for each in text],
        "new log_probs": generation.log_probs,
        "new logits": generation.logits,
        "new sites": dict(generation.cache),
        "sampled": sampled,
        "streamed": [list(piece) for piece in model.generate_stream(model.to_tokens(TEXTS[0]), 8)],
        "stopped": [list(each.encode()) for each in stopped],
    }


def lo_of(model):
    """A metric of logits: that of an answer, less that of another token."""
    answer = model.to_single_token("lo")
    return lambda logits: logits[0, -1, answer] - logits[0, -1, 5]


def sweeps(model):
    both = model, CORRUPTED, CLEAN, lo_of(model)
    return {
        "patched": analysis.activation_patching(*both, "z", ("layer", "head"), progress=False),
        "resumed": analysis.activation_patching(*both, "resid_pre", ("layer", "pos"), progress=False),
    }


def analyses(model):
    answer, metric = model.to_single_token("lo"), lo_of(model)
    both = model, CORRUPTED, CLEAN, metric
    lens = analysis.logit_lens(model, TEXTS, targets=[answer])
    components, _ = analysis.direct_logit_attribution(model, CLEAN, answer, by="head")
    prompt = analysis.test_prompt(model, CLEAN, "lo")
    return {
        **sweeps(model),
        "paths": analysis.path_patching(*both, receivers=[("k", 1, 0)], progress=False),
        "attributed": analysis.attribution_patching(*both, "z", ("layer", "head")),
        "edges": analysis.edge_attribution(*both),
        "integrated": analysis.integrated_gradients(model, CLEAN, "hook_embed", metric),
        "lens": [lens.log_probs, lens.target_log_probs],
        "components": components,
        "induction": analysis.detect_heads(model, TEXTS[0], "induction_head"),
        "losses": analysis.loss_per_token(model, TEXTS),
        "prompt": prompt.probabilities,
        "circuit": analysis.qk_circuit(model.config, model.params)[0, 0].AB,
        "composition": analysis.all_composition_scores(model.config, model.params, "K"),
    }
