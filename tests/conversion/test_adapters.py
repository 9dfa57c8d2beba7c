"""Adapters that PEFT writes, merged at load, equal PEFT's own `merge_and_unload`."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import (
    CheckpointError,
    convert_checkpoint,
    export_checkpoint,
    load_params,
    save_params,
)
from gemma3_jax import HookedGemma3
from gemma3_jax.conversion.lora import lora_delta
from tests.conversion.adapter_files import (
    LORA,
    edit_config,
    edit_weights,
    hf,
    lora,
    merged,
    near,
    of_hf,
    trained,
    unequal,
    write_base,
)

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about tied embeddings and unused options

OTHERS = {
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj", "up_proj"], r=3, alpha=5),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 7], target_modules=["embed_tokens"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random tied model of three layers, with a tokenizer nowhere."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LORA)
def test_lora_equals_peft(base, tmp_path, name, dtype):
    """PEFT sums the norms of DoRA, of at most 64 numbers, in float32; we in float64."""
    adapter = lora(base, tmp_path / "adapter", **LORA[name])
    config, params = convert_checkpoint(base, adapter=adapter, dtype=dtype)
    hf_config, hf_params = merged(base, adapter, dtype)
    assert config.tie_word_embeddings == hf_config.tie_word_embeddings
    assert near(params, hf_params, terms=8)  # the largest rank, of the products and of DoRA's norms
    plain = convert_checkpoint(base, dtype=dtype)[1]
    if not name.startswith("saved") or config.tie_word_embeddings:
        assert unequal(params, plain) != []  # the adapter does something


@pytest.mark.parametrize("name", OTHERS)
def test_other_types_equal_peft(base, tmp_path, name):
    """IA3, LoHa and trained tokens are plain arithmetic, too."""
    adapter = trained(base, tmp_path / "adapter", OTHERS[name]())
    assert near(convert_checkpoint(base, adapter=adapter)[1], merged(base, adapter, "float32")[1], terms=8)
    assert unequal(convert_checkpoint(base, adapter=adapter)[1], convert_checkpoint(base)[1]) != []


@pytest.mark.parametrize(("name", "wrong"), [("plain", {"lora_alpha": 4}), ("rslora", {"use_rslora": False})])
def test_a_wrong_scale_differs(base, tmp_path, name, wrong):
    """Negative control: with alpha ignored, or the scale of plain LoRA for rslora, the parameters are not PEFT's."""
    adapter = lora(base, tmp_path / "adapter", **LORA[name])
    right = merged(base, adapter, "float32")[1]
    edit_config(adapter, **wrong)
    assert not near(convert_checkpoint(base, adapter=adapter)[1], right, terms=8)


def test_biases_equal_peft(tmp_path):
    """`bias="all"` stores the base's biases, `lora_bias` adds one to them, and IA3 scales them."""
    torch.manual_seed(2)
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, attention_bias=True,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "base")
    configs = {
        "all": peft.LoraConfig(target_modules=["q_proj"], bias="all"),
        "lora_only": peft.LoraConfig(target_modules=["q_proj"], bias="lora_only"),
        "lora_bias": peft.LoraConfig(target_modules=["q_proj", "o_proj"], lora_bias=True),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }
    for name, each in configs.items():
        adapter = trained(tmp_path / "base", tmp_path / name, each)
        params = convert_checkpoint(tmp_path / "base", adapter=adapter)[1]
        assert near(params, merged(tmp_path / "base", adapter, "float32")[1], terms=8), name


def test_one_adapter_for_tied_embeddings_is_added_once(base, tmp_path):
    """With `ensure_weight_tying` PEFT stores two copies; the model that was trained has the delta once."""
    torch.manual_seed(1)
    tuned = peft.get_peft_model(hf(base), peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
    with torch.no_grad():
        embedding = tuned.get_input_embeddings()
        embedding.lora_embedding_A["default"].add_(0.1 * torch.randn(8, 64))
        embedding.lora_embedding_B["default"].add_(0.1 * torch.randn(32, 8))
        head = tuned.base_model.model.lm_head
        head.lora_A["default"].weight.copy_(embedding.lora_embedding_B["default"].T)
        head.lora_B["default"].weight.copy_(embedding.lora_embedding_A["default"].T)
        tokens = torch.arange(2, 10)[None]
        logits = tuned(tokens).logits.numpy()
    tuned.save_pretrained(tmp_path / "adapter")
    model = HookedGemma3.from_pretrained(base, adapter=tmp_path / "adapter")
    np.testing.assert_allclose(np.asarray(model(tokens.numpy())), logits, atol=1e-5 * np.abs(logits).max())


def test_a_larger_vocabulary(base, tmp_path):
    """An adapter that was trained after tokens were added brings the embedding, and the config follows."""
    model = hf(base)
    model.resize_token_embeddings(70)
    options = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapter = trained(base, tmp_path / "adapter", options, model)
    config, params = convert_checkpoint(base, adapter=adapter)
    resized = hf(base)
    resized.resize_token_embeddings(70)
    theirs = of_hf(peft.PeftModel.from_pretrained(resized, adapter).merge_and_unload())[1]
    assert config.vocab_size == 70
    assert near(params, theirs, terms=8)


def test_multimodal_names(base, tmp_path):
    """An adapter of a multimodal model fits the text model; what it has for the vision half is left out."""
    adapter = lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    right = convert_checkpoint(base, adapter=adapter)[1]

    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("model.model.layers", "model.model.language_model.layers")] = tensors.pop(key)
        vision = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
        tensors[f"{vision}.lora_A.weight"] = np.ones((8, 4), np.float32)
        tensors[f"{vision}.lora_B.weight"] = np.ones((4, 8), np.float32)

    edit_weights(adapter, rename)
    assert unequal(convert_checkpoint(base, adapter=adapter)[1], right) == []


def test_the_adapter_alone_names_its_base(base, tmp_path, monkeypatch):
    """The base is a path in the adapter's config, absolute or relative to the working directory."""
    adapter = lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    expected = convert_checkpoint(base, adapter=adapter)[1]
    assert unequal(convert_checkpoint(adapter)[1], expected) == []
    shutil.copytree(base, tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    edit_config(adapter, base_model_name_or_path="./here")
    model = HookedGemma3.from_pretrained(adapter)
    assert unequal(model.params, expected) == []
    assert model.config.eos_token_id == (1, 5)


def test_two_adapters_in_turn(base, tmp_path):
    """The base of an adapter may be an adapter: the first is merged, then the second."""
    first = lora(base, tmp_path / "first", target_modules=["q_proj"])
    second = lora(base, tmp_path / "second", target_modules=["q_proj", "v_proj"], r=2)
    once = peft.PeftModel.from_pretrained(hf(base), first).merge_and_unload()
    twice = peft.PeftModel.from_pretrained(once, second).merge_and_unload()
    assert near(convert_checkpoint(first, adapter=second)[1], of_hf(twice)[1], terms=16)


def test_half_precision_adapter(base, tmp_path):
    """PEFT reads an adapter in bfloat16 as float32."""
    adapter = lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_weights(adapter, lambda tensors: tensors.update({k: v.astype(jnp.bfloat16) for k, v in tensors.items()}))
    assert near(convert_checkpoint(base, adapter=adapter)[1], merged(base, adapter, "float32")[1], terms=8)


def test_first_layers_of_an_adapted_model(base, tmp_path):
    """The first layers have the adapter; what it has for the others is not read, so NaN there does not matter."""
    adapter = lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    right = convert_checkpoint(base, adapter=adapter)[1]
    edit_weights(adapter, lambda t: t.update({k: np.nan * v for k, v in t.items() if "layers.2." in k}))
    config, params = convert_checkpoint(base, adapter=adapter, first_n_layers=2)
    assert config.truncated_from == 3
    assert unequal(params, {key: value for key, value in right.items() if key != "blocks_2"}) == []


def test_converted_parameters_take_no_adapter(base, tmp_path):
    """Parameters that were converted have other names; a merged model can be converted, saved and loaded."""
    adapter = lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    config, params = convert_checkpoint(base, adapter=adapter)
    save_params(config, params, tmp_path / "converted")
    assert unequal(load_params(tmp_path / "converted")[1], params) == []
    with pytest.raises(CheckpointError, match="give adapter when you convert the checkpoint"):
        HookedGemma3.from_pretrained(tmp_path / "converted", adapter=adapter)


def test_a_tied_merge_is_announced(base, tmp_path, caplog):
    """LoRA on one end of tied embeddings: `merge_and_unload` changes both ends, and so do we, with a warning."""
    adapter = lora(base, tmp_path / "adapter", target_modules=["lm_head"])
    with caplog.at_level(logging.WARNING):
        convert_checkpoint(base, adapter=adapter)
    assert "changes lm_head of a base with tied embeddings" in caplog.text


@pytest.mark.parametrize("name", ["dora", "saved_both", "tokens"])
def test_from_hf_merges_a_copy(base, tmp_path, name):
    """A PEFT model in memory gives what `merge_and_unload` gives, and still has its adapter afterwards."""
    adapter = lora(base, tmp_path / "adapter", **LORA[name])
    tuned = peft.PeftModel.from_pretrained(hf(base), adapter)
    before = {key: value.clone() for key, value in tuned.state_dict().items()}
    model = HookedGemma3.from_hf(tuned)
    after = tuned.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert near(model.params, merged(base, adapter, "float32")[1], terms=8)


def test_from_hf_takes_every_class(base):
    """The causal, the bare text and the multimodal class give one set of parameters, stop tokens and all."""
    causal = hf(base)
    model = HookedGemma3.from_hf(causal)
    assert model.config == convert_checkpoint(base)[0]
    assert unequal(model.params, convert_checkpoint(base)[1]) == []
    assert unequal(HookedGemma3.from_hf(causal.model).params, model.params) == []
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Gemma3Config(
        text_config=causal.config.to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )  # fmt: skip
    whole = transformers.Gemma3ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(causal.model.state_dict())
    assert unequal(HookedGemma3.from_hf(whole).params, model.params) == []
    assert HookedGemma3.from_hf(causal, dtype="bfloat16").params["embed"]["weight"].dtype == jnp.bfloat16


def test_from_hf_computes_with_the_unembedding_that_the_model_has(base):
    """A tied config with another unembedding: the model in memory computes with both, and so do we."""
    model = hf(base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    hooked = HookedGemma3.from_hf(model)
    assert not hooked.config.tie_word_embeddings
    assert jax.tree.leaves(hooked.params["unembed"])[0].shape == (32, 64)


def test_from_hf_refuses_what_it_cannot_read(base):
    """No model, and weights without data."""
    with pytest.raises(CheckpointError, match="str is not a model of transformers"):
        HookedGemma3.from_hf("google/gemma-3-270m")
    config = hf(base).config
    with torch.device("meta"):
        empty = transformers.Gemma3ForCausalLM(config)
    with pytest.raises(CheckpointError, match="on the meta device"):
        HookedGemma3.from_hf(empty)


def test_over_a_gguf_base(gguf_file, gguf_cache, tmp_path):
    """The weights are dequantised and then merged. Norms, which GGUF stores as 1 + w, cannot be replaced by w."""
    base = tmp_path / "base"
    export_checkpoint(*convert_checkpoint(gguf_file, "float32"), base)
    adapter = lora(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], r=4)
    params = convert_checkpoint(gguf_file, "float32", adapter=adapter)[1]
    _, expected = merged(base, adapter, "float32")
    weights = [key for key in unequal(params, expected) if "ln" not in key and "norm" not in key]
    assert weights == []
    assert unequal(convert_checkpoint(gguf_file, "float32")[1], params)  # control: the adapter changes weights
    norms = lora(base, tmp_path / "norms", target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    with pytest.raises(CheckpointError, match="stores norms in another form"):
        convert_checkpoint(gguf_file, adapter=norms)


def test_products_without_a_cpu_backend(monkeypatch):
    """JAX_PLATFORMS=cuda leaves out the CPU: the products run on the default device."""
    own = jax.local_devices

    def local_devices(backend=None, **options):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return own(**options)

    monkeypatch.setattr(jax, "local_devices", local_devices)
    assert lora_delta(np.float32([[1, 2]]), np.float32([[3], [4]]), 0.5).tolist() == [[1.5, 3], [2, 4]]
