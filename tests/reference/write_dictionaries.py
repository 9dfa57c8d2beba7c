"""Writes small dictionaries with the libraries of other formats, and what these libraries compute with them.

The files are in `tests/features/fixtures`. Each library needs an environment of its own, with torch:

    pip install 'sae-lens==6.54.*' 'transformer-lens<4'     # for saelens
    pip install dictionary-learning==0.1.0 nnsight          # for dictionary_learning
    pip install 'eai-sparsify==1.3.*'                       # for sparsify
    pip install circuit-tracer==0.5.0                       # for circuit_tracer
    python tests/reference/write_dictionaries.py saelens    # or another of these names

Each case is a folder with the files of its format and `expected.safetensors`: an input x, its features f, the output y.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[1] / "features" / "fixtures"
D, OUT, F, K, LAYERS = 6, 5, 12, 3, 3


def randomize(module):
    """Random parameters; some thresholds are negative, and the first feature is exactly at its threshold."""
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn(parameter.shape).to(parameter.dtype)
        if "threshold" in name:
            parameter.data = 0.5 * parameter.data
            parameter.data[..., 0] = 0.25
            parameter.data[..., 1] = -1.0
    return module


def at_threshold(W_enc, b_enc):
    """Make z of feature 0 equal to its threshold, and of feature 1 negative, but above its threshold."""
    W_enc.data[:, :2] = 0
    b_enc.data[:2] = torch.tensor([0.25, -0.5])


def record(folder, x, f, y, **more):
    """Write what the library computed."""
    tensors = {"x": x, "f": f, "y": y, **more}
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")


def folder_of(kind, case):
    """A new folder for a case."""
    folder = FIXTURES / kind / case
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def saelens():
    """SAELens: each architecture, and the settings that change what an autoencoder computes."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

    resid, hook_z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
    cases = {
        "standard": ("standard", {}, resid),
        "no_b_dec": ("standard", {"apply_b_dec_to_input": False}, resid),
        "constant_norm": ("standard", {"normalize_activations": "constant_norm_rescale"}, resid),
        "layer_norm": ("jumprelu", {"normalize_activations": "layer_norm"}, resid),
        "hook_z": ("standard", {"reshape_activations": "hook_z"}, hook_z),
        "topk": ("topk", {"k": K}, resid),
        "topk_rescaled": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}, resid),
        "jumprelu": ("jumprelu", {}, resid),
        "gated": ("gated", {}, resid),
        "transcoder": ("transcoder", {}, "blocks.1.ln2.hook_out"),
        "skip_transcoder": ("skip_transcoder", {}, "blocks.1.ln2.hook_out"),
        "jumprelu_transcoder": ("jumprelu_transcoder", {}, "blocks.1.ln2.hook_out"),
        "jumprelu_skip_transcoder": (
            "jumprelu_skip_transcoder",
            {"normalize_activations": "layer_norm"},
            "blocks.1.ln2.hook_out",
        ),
    }
    for case, (architecture, settings, hook) in cases.items():
        sae_class, config_class = get_sae_class(architecture)
        if "transcoder" in architecture:
            settings = {"d_out": OUT, "apply_b_dec_to_input": False, **settings}
        sae = randomize(sae_class(config_class(d_in=D, d_sae=F, **settings)))
        sae.cfg.metadata.hook_name = hook
        sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out" if "transcoder" in architecture else None
        if "jumprelu" in architecture:
            at_threshold(sae.W_enc, sae.b_enc)
        sae.save_model(folder := folder_of("saelens", case))
        x = torch.randn(2, 3, 2, 3) if hook == hook_z else torch.randn(2, 3, D)
        loaded = SAE.load_from_disk(folder)
        record(folder, x, loaded.encode(x), loaded(x))
    saelens_batch_topk()
    saelens_before_6("old", {"activation_fn_str": "relu"})
    saelens_before_6("old_topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}})
    saelens_before_6("old_no_b_dec", {"activation_fn_str": "relu", "apply_b_dec_to_input": False})


def saelens_batch_topk():
    """A trained BatchTopK autoencoder is saved as a JumpReLU one."""
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    sae = randomize(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)))
    sae.topk_threshold.fill_(0.8)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_inference_model(folder := folder_of("saelens", "batchtopk"))
    x, loaded = torch.randn(2, 3, D), SAE.load_from_disk(folder)
    record(folder, x, loaded.encode(x), loaded(x))


def saelens_before_6(case, settings):
    """A config with the names of versions before 6, which SAELens reads too."""
    from sae_lens import SAE

    folder = folder_of("saelens", case)
    weights = load_file(FIXTURES / "saelens" / "standard" / "sae_weights.safetensors")
    save_file({**weights, "scaling_factor": torch.ones(F)}, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    config |= {"hook_point": "blocks.1.hook_resid_post", "hook_point_layer": 1, "normalize_activations": False}
    (folder / "cfg.json").write_text(json.dumps({**config, **settings}))
    x, loaded = torch.randn(2, 3, D), SAE.load_from_disk(folder)
    record(folder, x, loaded.encode(x), loaded(x))


def dictionary_learning():
    """dictionary_learning: each class, as `load_dictionary` loads it."""
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    made = {
        AutoEncoder: (),
        AutoEncoderNew: (),
        GatedAutoEncoder: (),
        JumpReluAutoEncoder: (),
        AutoEncoderTopK: (K,),
        BatchTopKSAE: (K,),
        MatryoshkaBatchTopKSAE: (K, [4, 8]),
    }
    for kind, arguments in made.items():
        ae, folder = randomize(kind(D, F, *arguments)), folder_of("dictionary_learning", kind.__name__)
        if kind is JumpReluAutoEncoder:
            at_threshold(ae.W_enc, ae.b_enc)
        if kind in (BatchTopKSAE, MatryoshkaBatchTopKSAE):
            ae.threshold.fill_(0.8)
        trainer = {"dict_class": kind.__name__, "activation_dim": D, "dict_size": F, "layer": 1}
        trainer |= {"submodule_name": "resid_post_layer_1", **({"k": K} if arguments else {})}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
        torch.save(ae.state_dict(), folder / "ae.pt")
        x, loaded = torch.randn(6, D), load_dictionary(str(folder), "cpu")[0]
        record(folder, x, loaded.encode(x), loaded(x))


def sparsify():
    """sparsify: an autoencoder and transcoders, each in a folder with the name of its module."""
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    for case, settings in (
        ("sae/layers.1", {}),
        ("transcoder/layers.1.mlp", {"transcode": True}),
        ("skip/layers.1.mlp", {"transcode": True, "skip_connection": True}),
        ("expanded/layers.0.self_attn", {"expansion_factor": 2, "num_latents": 0}),
        ("groupmax/layers.1", {"activation": "groupmax"}),
    ):
        coder = randomize(SparseCoder(D, SparseCoderConfig(**{"num_latents": F, "k": K, **settings})))
        coder.save_to_disk(folder := folder_of("sparsify", case))
        x, loaded = torch.randn(5, D), SparseCoder.load_from_disk(folder)
        values, indices, _ = loaded.encode(x)
        f = torch.zeros(5, F).scatter(-1, indices, values)
        record(folder, x, f, loaded(x).sae_out)


def circuit_tracer():
    """circuit-tracer: transcoders of single layers with relu, with JumpReLU and a skip connection; and CLTs."""
    import torch.nn.functional
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
    from circuit_tracer.transcoder.single_layer_transcoder import (
        SingleLayerTranscoder,
        TranscoderSet,
        load_relu_transcoder,
    )

    float32, relu = {"dtype": torch.float32, "device": torch.device("cpu")}, torch.nn.functional.relu
    hooks = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    for case, jump, skip in (("plt_relu", False, False), ("plt_jumprelu_skip", True, True)):
        folder = folder_of("circuit_tracer", case)
        ones = {}
        for layer in range(LAYERS):
            activation = JumpReLU(torch.zeros(F), 0.1) if jump else relu
            one = randomize(SingleLayerTranscoder(D, F, activation, layer, skip_connection=skip, **float32))
            if jump:
                at_threshold(one.W_enc.T, one.b_enc)
            ones[layer] = one
        TranscoderSet(ones, "hook_resid_mid", "hook_mlp_out").to_safetensors(str(folder))
        (folder / "config.yaml").write_text(f"model_kind: transcoder_set\nmodel_name: gemma\n{hooks}")
        x = torch.randn(LAYERS, 4, D)
        loaded = [
            load_relu_transcoder(str(folder / f"layer_{layer}.safetensors"), layer, torch.device("cpu"))
            for layer in range(LAYERS)
        ]
        record(
            folder,
            x,
            torch.stack([one.encode(x[layer]) for layer, one in enumerate(loaded)]),
            torch.stack([one(x[layer]) for layer, one in enumerate(loaded)]),
        )
    for case, function in (("clt_relu", "relu"), ("clt_jumprelu", "jump_relu")):
        folder = folder_of("circuit_tracer", case)
        clt = CrossLayerTranscoder(LAYERS, F, D, function, lazy_decoder=False, **float32)
        randomize(clt).to_safetensors(str(folder))
        (folder / "config.yaml").write_text(f"model_kind: cross_layer_transcoder\nmodel_name: gemma\n{hooks}")
        x, loaded = torch.randn(LAYERS, 4, D), load_clt(str(folder), **float32)
        record(folder, x, loaded.encode(x), loaded(x))


if __name__ == "__main__":
    torch.manual_seed(0)
    {
        "saelens": saelens,
        "dictionary_learning": dictionary_learning,
        "sparsify": sparsify,
        "circuit_tracer": circuit_tracer,
    }[sys.argv[1]]()
