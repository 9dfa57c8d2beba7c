"""The example scripts run, and show what they say."""

import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import find_induction_heads

    yield find_induction_heads
    sys.modules.pop("find_induction_heads")


def test_three_ways_find_the_same_heads(example, tmp_path, capsys):
    """The script itself compares them and draws figures; without these heads the model no longer copies."""
    example.main(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("L1H0") == printed.count("L1H3") == 3
    assert {file.name for file in tmp_path.iterdir()} == {
        f"{name}.{suffix}" for name in ("patterns", *example.MEASURES) for suffix in ("html", "png")
    }
    model = example.HookedGemma3.from_pretrained(example.TINY, dtype="float32")
    clean = example.repeated_tokens(model, rows=4, half=example.HALF, seed=2)
    corrupted = clean.copy()
    corrupted[:, 1 : example.HALF + 1] = clean[::-1, 1 : example.HALF + 1]
    loss = example.out_and_back(model, clean, corrupted, [(1, head) for head in range(4)])
    assert loss["intact prompt"] > -0.1
    assert loss["intact, these heads ablated"] < -4
    assert loss["intact, as many others ablated"] > -2  # control
    assert loss["first half exchanged"] < -3
    assert loss["exchanged, these heads patched in"] > -0.1
    assert loss["exchanged, as many others patched in"] < -3  # control


def test_disagreement_is_an_error(example, tmp_path, monkeypatch):
    """The script does not call heads found on which its ways differ."""
    scores = {name: np.eye(4)[::-1] if name == "patching" else np.eye(4) for name in example.MEASURES}
    monkeypatch.setattr(example, "three_ways", lambda *arguments: scores)
    with pytest.raises(SystemExit, match="do not agree"):
        example.main(tmp_path, count=1)


def test_attribution_of_a_similarity(monkeypatch, capsys):
    """Contributions of states add up; the gradient agrees with leaving out each token, and shuffled it does not."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import attribute_similarity

    value, answers = attribute_similarity.main()
    assert "correlation" in capsys.readouterr().out
    np.testing.assert_allclose(answers["state"].sum(axis=1), value, atol=1e-5)
    gradient, without = (answers[name].ravel() for name in ("gradient", "without"))
    assert np.corrcoef(gradient, without)[0, 1] > 0.7
    assert np.corrcoef(np.roll(gradient, 3), without)[0, 1] < 0.7  # control


def test_low_rank_factors(monkeypatch, tmp_path, capsys):
    """They learn answers, those of texts held out too, and the adapter that is saved is the model that was trained."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import lora

    losses = lora.main(str(lora.TINY), steps=15, output=tmp_path / "adapter")
    assert "3 texts, 1 held out, 24,576 numbers to train" in capsys.readouterr().out
    assert losses.shape == (2, 4)
    assert (losses[0] > 3).all()
    assert (losses[1] < 1.5).all()
    for adapter, wanted in ((None, losses[0]), (tmp_path / "adapter", losses[1])):
        model = lora.HookedGemma3.from_pretrained(lora.TINY, dtype="float32", adapter=adapter)
        tokens, batch = lora.batch_of(model, lora.SYLLABLES)
        np.testing.assert_allclose(model(tokens, "loss_per_row", **batch), wanted, rtol=1e-4)


def test_texts_of_a_file(monkeypatch, tmp_path, capsys):
    """Without a step, the factors change nothing; each line has a prompt and its answer."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import lora

    (tmp_path / "texts.tsv").write_text("ba ke\t lo\nlo mu ti\t ba ke\n", "utf-8")
    losses = lora.main(str(lora.TINY), tmp_path / "texts.tsv", steps=0, rank=2)
    assert "1 texts, 1 held out, 12,288 numbers" in capsys.readouterr().out
    np.testing.assert_array_equal(*losses)


def test_features_are_trained(monkeypatch, tmp_path, capsys):
    """They explain held-out texts, and are saved by kind and layer; after one step not. A file gives texts too."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_features

    from gemma3_jax import features

    small = {"layers": "2", "width": 96, "rows": 72, "held_out": 8}
    results = train_features.main(**small, steps=100, output=tmp_path / "features")
    printed = capsys.readouterr().out
    places = [f"{kind}_all/layer_2_width_96_l0_small" for kind in ("resid_post", "transcoder")]
    assert list(results) == places
    for place, (report, history) in results.items():
        assert len(history) == 2
        assert f"{place}\n  {report}" in printed
        assert report.fvu < 0.3
        assert features.load(tmp_path / "features", place).W_enc.dtype == "float16"
    untrained, _ = train_features.main(**small, kinds="resid_post", steps=1)[places[0]]
    assert untrained.fvu > 0.5  # control
    (tmp_path / "texts.txt").write_text("ba ke\n\nlo mu\nti\n", "utf-8")
    model = train_features.HookedGemma3.from_pretrained(train_features.TINY)
    assert train_features.texts_of(model, tmp_path / "texts.txt", 1, held_out=1) == (["ba ke", "lo mu"], ["ti"])
    assert train_features.folder_of("mlp_out", 9, 16384, 60) == "mlp_out_all/layer_9_width_16k_l0_medium"
