"""`check` tells the site that a dictionary was made for from every other one."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import TINY, HookedGemma3, features
from gemma3_jax.features import checking
from gemma3_jax.features.neighbours import _KINDS
from tests.features.small_dictionaries import clt, crosscoder, transcoder
from tests.helpers.small_model import SITES as SMALL_SITES
from tests.helpers.small_model import TOKENS, small

TEXTS = ["ba ke lo mu ti so re na du pi ba ke lo mu ti so", "so re na ti ba pi du ke so re na", "ke pi ti lo ke pi"]
RANK = 24
SITE = "blocks.1.hook_out"


def principal(x, y=None):
    """An encoder and decoder for positive and negative parts of the largest components of x [n, d], and y by them."""
    y = x if y is None else y
    mean, y_mean = x.mean(0), y.mean(0)
    _, _, vt = np.linalg.svd(x - mean, full_matrices=False)
    basis = vt[:RANK].T
    back = np.linalg.lstsq((x - mean) @ basis, y - y_mean, rcond=None)[0]
    return {
        "W_enc": jnp.asarray(np.concatenate([basis, -basis], 1)),
        "b_enc": jnp.asarray(np.concatenate([-mean @ basis, mean @ basis])),
        "W_dec": jnp.asarray(np.concatenate([back, -back])),
        "b_dec": jnp.asarray(y_mean),
        "activation": features.Relu(),
    }


@pytest.fixture(scope="module")
def model():
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


@pytest.fixture(scope="module")
def values(model):
    """Values [n, d] of the sites of the blocks, without BOS and padding."""
    names = [f"blocks.{i}.{kind}" for i in range(model.config.num_hidden_layers) for kind in _KINDS]
    _, cache = model.run_with_cache(TEXTS, names)
    kept = np.cumsum(cache.attention_mask, 1) * cache.attention_mask > 1
    return {name: np.asarray(cache[name], np.float32)[kept] for name in names}


@pytest.mark.parametrize("kind", ["hook_out", "ln2.hook_normalized", "mlp.out.hook_out"])
def test_an_autoencoder_is_found_at_its_site(model, values, kind):
    """It explains that site, and all others much worse: every wrong site fails."""
    right = f"blocks.1.{kind}"
    weights = principal(values[right])
    report = features.SparseAutoencoder(**weights, site_in=right).check(model, TEXTS)
    assert report.fvu < 0.15
    assert not report.better, report
    assert len(report.neighbours) >= len(_KINDS) - 1
    assert min(fvu for _, fvu in report.neighbours) > 2 * report.fvu


def test_an_autoencoder_at_another_site_names_its_own(model, values):
    """As an attribute, and where a user sees it."""
    right = "blocks.1.mlp.out.hook_out"
    report = features.SparseAutoencoder(**principal(values[right]), site_in="blocks.1.ln2_post.hook_out").check(
        model, TEXTS
    )
    assert report.better[0][0] == right
    assert report.fvu > 10 * report.better[0][1]
    assert f"{right} explains more" in repr(report)


def test_a_transcoder_at_the_wrong_input_or_output(model, values):
    """The input before the gain, the output before the post-norm, and both in the layer beside."""
    read, wrote = "blocks.1.ln2.hook_out", "blocks.1.ln2_post.hook_out"
    weights = principal(values[read], values[wrote])
    right = features.Transcoder(**weights, site_in=read, site_out=wrote).check(model, TEXTS)
    assert not right.better
    for site_in, site_out, found in [
        ("blocks.1.ln2.hook_normalized", wrote, read),
        (read, "blocks.1.mlp.out.hook_out", wrote),
        ("blocks.0.ln2.hook_out", "blocks.0.ln2_post.hook_out", read),
    ]:
        report = features.Transcoder(**weights, site_in=site_in, site_out=site_out).check(model, TEXTS)
        assert report.fvu > 1.2 * right.fvu
        assert report.better[0] == (found, pytest.approx(right.fvu, rel=1e-3))


def test_the_figures_are_those_of_their_definitions(model, values):
    """FVU, L0, dead features and cosine of the tokens after BOS; padding and BOS do not count."""
    site = "blocks.1.hook_out"
    weights = principal(values[site])
    weights["b_enc"] = weights["b_enc"].at[:3].set(-1e6)
    sae = features.SparseAutoencoder(**weights, site_in=site)
    report = sae.check(model, TEXTS)
    x = values[site]
    y, f = np.asarray(sae(x)), np.asarray(sae.encode(x))
    assert report.tokens == len(x)
    assert report.fvu == pytest.approx(((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-3)
    assert report.l0 == pytest.approx((f > 0).sum(-1).mean(), rel=1e-4)
    assert report.dead == pytest.approx((~(f > 0).any(0)).mean())
    assert report.cosine == pytest.approx(
        ((x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)).mean(), rel=1e-4
    )
    nothing = sae.replace(W_dec=0 * sae.W_dec, b_dec=0 * sae.b_dec).check(model, TEXTS)
    assert nothing.delta_loss > report.delta_loss > -0.5


def test_negative_features_are_active(model, values):
    """Where the activation keeps negative features, L0 and dead features count them."""
    weights = principal(values[SITE])
    kept = features.JumpRelu(jnp.asarray(-1e6), rectify=False)
    report = features.SparseAutoencoder(**weights | {"activation": kept}, site_in=SITE).check(model, TEXTS)
    assert (report.l0, report.dead) == (2 * RANK, 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_the_same_length_run_together(model, values, monkeypatch, side):
    """Short texts do not run at the length of long ones, wherever the padding is; the figures are the same."""
    sae, shapes, run = (
        features.SparseAutoencoder(**principal(values[SITE]), site_in=SITE),
        [],
        HookedGemma3.run_with_cache,
    )
    texts = [*TEXTS, "ba ke lo mu"]

    def recorded(self, tokens, *arguments, **options):
        shapes.append(np.shape(tokens))
        return run(self, tokens, *arguments, **options)

    monkeypatch.setattr(HookedGemma3, "run_with_cache", recorded)
    together = sae.check(model, texts)
    longest = shapes[0][1]
    monkeypatch.setattr(checking, "ROWS", 1)
    alone = sae.check(model, model.to_tokens(texts, padding_side=side))
    assert [rows for rows, _ in shapes] == [4, 1, 1, 1, 1]
    widths = [width for _, width in shapes[1:]]
    assert widths == sorted(widths)
    assert widths[0] <= longest / 2
    assert widths[-1] == longest
    for name in ("fvu", "l0", "dead", "cosine", "delta_loss", "tokens"):
        assert getattr(alone, name) == pytest.approx(getattr(together, name), rel=1e-4, abs=1e-5)


def test_rows_of_padding_count_for_nothing(model, values):
    """As many as run together: the figures are those without them."""
    sae, ids = (
        features.SparseAutoencoder(**principal(values[SITE]), site_in=SITE),
        np.asarray(model.to_tokens(TEXTS[0])),
    )
    empty = np.full((checking.ROWS, ids.shape[1]), model.config.padding)
    mask = np.concatenate([np.ones_like(ids), np.zeros_like(empty)])
    found = sae.check(model, {"input_ids": np.concatenate([ids, empty]), "attention_mask": mask})
    wanted = sae.check(model, ids)
    for name in ("fvu", "l0", "dead", "cosine", "delta_loss", "tokens"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("make", [transcoder, clt, crosscoder])
def test_every_kind_can_be_checked(make):
    """Random ones explain nothing, and those of several layers name sites of all layers."""
    one = make()
    report = one.check(HookedGemma3(*small()), TOKENS)
    assert report.fvu > 0.5
    assert np.isfinite(report.delta_loss)
    assert report.site.replace("*", "0").replace("blocks.1", "blocks.0") in SMALL_SITES


def test_the_first_use_of_a_loaded_dictionary_is_logged_once(tmp_path, caplog, model, values):
    """Unless it was checked; nothing runs for the message, and other dictionaries are taken at their word."""
    site = "blocks.1.hook_out"
    made = features.SparseAutoencoder(**principal(values[site]), site_in=site)
    features.save(made, tmp_path / "sae")
    with caplog.at_level(logging.WARNING):
        features.splice(made)
        checked = features.load(tmp_path / "sae")
        checked.check(model, TEXTS)
        features.Encode(checked, k=3)
        assert not caplog.messages
        loaded = features.load(tmp_path / "sae")
        features.Encode(loaded, k=3)
        features.steer(loaded, 3, 1.0)
    assert len(caplog.messages) == 1
    assert "sae.check(model, texts)" in caplog.messages[0]
