"""What a person sees at the prompt: descriptions, completion, and errors for the names of TransformerLens."""

import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma3_jax
from gemma3_jax import TINY, ActivationCache, Hook, HookedGemma3, analysis, edits, reductions
from gemma3_jax.elsewhere import ARGUMENTS, REMEDIES
from gemma3_jax.placing import make_mesh
from gemma3_jax.sites.names import resolve

RESID = "blocks.*.hook_resid_post"


@functools.cache
def tiny():
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


# --- descriptions -----------------------------------------------------------------------------------------------------


def test_a_model_describes_itself():
    """Layers, size, dtype, place and tokenizer; stacked, truncated, on a mesh, on the host and traced."""
    lines = repr(tiny()).splitlines()
    leaves = jax.tree.leaves(tiny().params)
    assert f"{sum(leaf.size for leaf in leaves):,} parameters" in lines[1]
    assert lines[1].endswith("float32")
    assert lines[2].strip() == f"on {next(iter(leaves[0].devices()))}"
    assert "TokenizersBackend" in lines[3]
    config, params = tiny().config, tiny().params
    assert "inputs are token ids" in repr(HookedGemma3(config, params))
    assert "stacked for scan_layers" in repr(HookedGemma3(config, params, scan_layers=True))
    assert "a mesh of 4 cpu devices: data 2, model 2" in repr(
        HookedGemma3(config, params, mesh=make_mesh(model=2, devices=jax.devices()[:4]))
    )
    assert "in host memory" in repr(HookedGemma3(config, jax.device_get(params)))
    assert "the first 2 of 4 layers" in repr(HookedGemma3.from_pretrained(TINY, first_n_layers=2))
    seen = []
    jax.jit(lambda model: seen.append(repr(model)))(tiny())
    assert "traced" in seen[0]


def test_a_cache_describes_itself():
    """Each kind of site once, with its layers; gradients, reductions and a missing batch axis are said."""
    names = [RESID, "blocks.1.attn.hook_z", "blocks.3.attn.hook_z", "blocks.2.attn.hook_pattern"]
    _, cache = tiny().run_with_cache("ba ke lo", names)
    lines, size = repr(cache).splitlines(), sum(value.nbytes for value in cache.values()) / 1024
    assert lines[0] == f"ActivationCache: 7 sites, {size:.1f} KiB, tokens [1, 4]"
    assert [re.split(" {2,}", line.strip()) for line in lines[1:]] == [
        ["blocks.{0..3}.hook_out", "[1, 4, 96] float32"],
        ["blocks.{1,3}.attn.o.hook_in", "[1, 4, 4, 24] float32"],
        ["blocks.2.attn.hook_pattern", "[1, 4, 4, 4] float32"],
    ]
    assert "no batch axis" in repr(cache.remove_batch_dim())
    _, whole = tiny().run_with_cache("ba ke lo")
    assert len(repr(whole).splitlines()) < 30
    assert "more kinds" in repr(whole)
    _, reduced = tiny().run_with_cache("ba ke lo", {RESID: reductions.TopK(3)})
    assert "reduced by TopK" in repr(reduced)
    _, backward = tiny().run_with_cache("ba ke lo", RESID, incl_bwd=True)
    assert "gradients of 4" in repr(backward)
    assert repr(ActivationCache(tiny().config, {})) == "ActivationCache: 0 sites, 0 bytes"


def test_completion_offers_every_name_of_the_captured_sites():
    """And no other; each of them works."""
    _, cache = tiny().run_with_cache("ba ke lo", ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"])
    offered = cache._ipython_key_completions_()
    assert {"blocks.1.hook_out", "blocks.1.hook_resid_post", "model.layers.1.output"} <= set(offered)
    assert {resolve(name, tiny().config).name for name in offered} == set(cache)
    assert all(cache[name].size for name in offered)


@pytest.mark.parametrize("asked", [RESID, "**", lambda name: name.endswith("hook_resid_post")])
def test_keys_are_found_by_the_name_that_was_asked_for(asked):
    """In loops over the cache, `keys` and `items`, also of gradients and after `jit`; keys are canonical names."""
    _, cache = tiny().run_with_cache("ba ke lo", asked, incl_bwd=True)
    expected = [f"blocks.{i}.hook_out" for i in range(4)]
    for each in (
        cache,
        cache.grads,
        jax.jit(lambda cache: cache)(cache),
        cache.numpy(),
        pickle.loads(pickle.dumps(cache)),
    ):
        for found in (
            [name for name in each if "resid_post" in name],
            [name for name in each.keys() if name.endswith("hook_resid_post")],
            [name for name, _ in each.items() if name.startswith("blocks.") and "hook_resid_post" in name],
        ):
            assert found == expected
            assert [type(name) is str or str(name) for name in found] == expected
            assert all(each[name].shape == (1, 4, 96) for name in found)
        assert [name for name in each if "nonsense" in name or name.endswith("resid_pre_")] == []
    plain = dict(cache)
    assert set(expected) <= set(plain)
    assert plain["blocks.1.hook_out"] is cache["blocks.1.hook_resid_post"]


# --- names of TransformerLens -----------------------------------------------------------------------------------------

OWNERS = {
    "HookedGemma3": tiny,
    "ActivationCache": lambda: ActivationCache(tiny().config, {}),
    "Hook": lambda: Hook("blocks.0.hook_out", 0, jnp.zeros((1, 2), jnp.int32)),
    "Gemma3Config": lambda: tiny().config,
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in REMEDIES.items() for name in names])
def test_a_name_from_elsewhere_says_what_to_write(kind, name):
    """The names in the remedy exist."""
    owner = OWNERS[kind]()
    with pytest.raises(AttributeError, match=re.escape(REMEDIES[kind][name])) as error:
        getattr(owner, name)
    assert "migration" in str(error.value)
    known = {"analysis": analysis, "gemma3_jax": gemma3_jax, "cache": OWNERS["ActivationCache"](), "model": tiny()}
    for where, attribute in re.findall(r"\b(analysis|gemma3_jax|cache|model)\.(\w+)", REMEDIES[kind][name]):
        assert hasattr(known[where], attribute), (where, attribute)
    first = re.match(r"use (\w+)( and|$|,)", REMEDIES[kind][name])
    assert first is None or hasattr(owner, first[1])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_from_elsewhere_says_what_to_write(name):
    """In every method that loads or runs a model; the names in the remedy exist."""
    model = tiny()
    for method in (model.from_pretrained, model, model.run_with_cache, model.run_with_hooks, model.generate):
        with pytest.raises(TypeError, match=re.escape(f"{name}: {ARGUMENTS[name]} (see docs/migration.md)")):
            method("ba ke", **{name: None})
    known = {"analysis": analysis, "gemma3_jax": gemma3_jax, "model": model, "HookedGemma3": HookedGemma3}
    for where, attribute in re.findall(r"\b(analysis|gemma3_jax|model|HookedGemma3)\.(\w+)", ARGUMENTS[name]):
        assert hasattr(known[where], attribute), (where, attribute)
    with pytest.raises(TypeError, match="nonsense") as error:  # control: Python's own error for other names
        model.run_with_cache("ba ke", nonsense=None)
    assert "migration" not in str(error.value)


def test_other_names_are_missing_as_everywhere():
    """No remedy is made up, and Python's own suggestion works."""
    for make in OWNERS.values():
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'") as error:
            _ = make().nonsense
        assert error.value.name == "nonsense"
        assert not hasattr(make(), "__jax_array__")


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        (lambda value, hook: value * hook.layer(), r"hook\.layer \(see docs/migration\.md\)"),
        (lambda value, hook: value * hook.ctx["x"], r"Hook has no ctx: .*names_filter.* \(see docs/migration\.md\)"),
    ],
)
def test_idioms_of_hooks_say_what_to_write(hook, says):
    """In one line, from inside a run; the attribute itself works."""
    with pytest.raises((TypeError, AttributeError)) as error:
        tiny().run_with_hooks("ba ke", (RESID, hook))
    assert re.search(says, "\n".join([str(error.value), *error.value.__notes__]))
    with pytest.raises(ValueError, match="shape") as other:
        tiny().run_with_hooks("ba ke", (RESID, lambda value, hook: value[0]))
    assert "migration" not in str(other.value)
    scaled = tiny().run_with_hooks("ba ke", ("blocks.1.hook_resid_post", lambda value, hook: value * hook.layer))
    np.testing.assert_allclose(scaled, tiny()("ba ke"), rtol=1e-4, atol=1e-4)


def test_single_tokens():
    """A token and its text are each other's inverse; several ids, and ids outside the vocabulary, are refused."""
    model = tiny()
    for token in (model.to_single_token("lo"), jnp.int32(7), np.array(7)):
        assert model.to_single_token(model.to_single_str_token(token)) == int(token)
    with pytest.raises(ValueError, match="must be one id"):
        model.to_single_str_token([3, 4])
    for outside in (-1, model.config.vocab_size):
        with pytest.raises(ValueError, match=str(outside)):
            model.to_single_str_token(outside)


def test_short_forms():
    """Names with their layer, names alone, and one id, as TransformerLens takes them."""
    model = tiny()
    _, cache = model.run_with_cache("ba ke lo", ["hook_embed", "blocks.1.attn.k.hook_out", "blocks.2.ln1.hook_scale"])
    for short, name in (("embed", "hook_embed"), ("k1", ("k", 1)), ("scale2ln1", ("scale", 2, "ln1"))):
        assert cache[short] is cache[name]
        assert short in cache
    for wrong in ("k9", "nothing3", "scale2ln9", "embed3"):
        assert wrong not in cache
        with pytest.raises(KeyError):
            _ = cache[wrong]
    assert model.to_str_tokens(model.to_single_token("lo")) == ["lo"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model, cache: model.to_tokens("ba", truncate=True), "truncate: texts are never truncated"),
        (lambda model, cache: cache.logit_attrs(cache, 3, batch_slice=0), r"batch_slice: use cache\.sliced\(batch="),
        (lambda model, cache: cache.apply_ln_to_stack(cache, batch_slice=0), r"batch_slice: use cache\.sliced\(batch="),
    ],
)
def test_arguments_of_other_methods_say_what_to_write(call, says):
    """Those of texts and of caches."""
    with pytest.raises(TypeError, match=says):
        call(tiny(), ActivationCache(tiny().config, {}))


def test_the_position_of_a_token():
    """It is the index in `to_str_tokens`, in text and in ids, with and without BOS."""
    model, text = tiny(), "ba ke lo ba ke"
    for mode, at in (("first", 2), ("last", 5)):
        assert model.get_token_position("ke", text, mode) == at
        assert model.get_token_position(model.to_single_token("ke"), model.to_tokens(text), mode) == at
        assert model.get_token_position("ke", model.to_tokens(text)[0], mode) == at
        assert model.get_token_position("ke", text, mode, prepend_bos=False) == at - 1
    with pytest.raises(ValueError, match=r"'mu'.* is not in .*'lo'"):
        model.get_token_position("mu", text)
    with pytest.raises(ValueError, match="2 rows"):
        model.get_token_position("ke", [text, text])
    with pytest.raises(ValueError, match="mode is 'middle'"):
        model.get_token_position("ke", text, "middle")


# --- forms of edits ---------------------------------------------------------------------------------------------------


def test_edits_are_a_mapping_pairs_or_one_pair():
    """In every method, and in the pure function; other things are refused with the three forms."""
    site, edit = "blocks.1.hook_resid_post", edits.Scale(0.5)
    tokens = tiny().to_tokens("ba ke lo")
    plain = tiny()(tokens)
    forms = {site: edit}, {site: [edit]}, [(site, edit)], ((site, edit),), [[site, edit]], (site, edit)
    for form in forms:
        hooked = tiny().run_with_hooks(tokens, form)
        pure, _ = gemma3_jax.forward(tiny().config, tiny().params, tokens, edits=form)
        np.testing.assert_array_equal(hooked, tiny().run_with_hooks(tokens, [(site, edit)]))
        np.testing.assert_allclose(pure, hooked, rtol=1e-4, atol=1e-4)
        assert np.abs(hooked - plain).max() > 0.01
        assert tiny().generate(tokens, 2, fwd_hooks=form).shape == (1, 6)
    named = (lambda name: name == site, edit)
    np.testing.assert_array_equal(tiny().run_with_hooks(tokens, named), hooked)
    for wrong in (edit, site, [edit], [(site,)], [site], 3):
        with pytest.raises(TypeError, match="pairs, or one such pair"):
            tiny().run_with_hooks(tokens, wrong)
