"""`gemma3-jax features`: check, search, dashboard and train, on the shipped model."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import TINY, HookedGemma3, features
from gemma3_jax.harvest import harvest
from tests.features.small_dictionaries import sae

SITE = "blocks.1.hook_out"
TEXTS = ["ba ke lo mu ti so re na du pi", "so re na ti", "ke pi ti lo ke pi"]
LAYOUT = ("--rows", 2, "--length", 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, a store of it, and two dictionaries: a random one, and one that is exact at its site."""
    path = tmp_path_factory.mktemp("features")
    (path / "corpus.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    d = model.config.hidden_size
    one = jnp.eye(d)
    both = {"W_enc": jnp.concatenate([one, -one], 1), "W_dec": jnp.concatenate([one, -one])}
    exact = sae(SITE, d=d, **both, b_enc=jnp.zeros(2 * d), b_dec=jnp.zeros(d))
    features.save(sae(SITE, d=d), path / "sae")
    features.save(exact, path / "exact")
    harvest(model, TEXTS * 8, SITE, path / "store", 2, 24)
    return path


def test_search(command, folder):
    """The library's result, as JSON; all features in a table; a store is a corpus; names are printed as they are."""
    given = (TINY, folder / "sae", folder / "corpus.jsonl", "--dtype", "float32", "--field", "body", *LAYOUT)
    done = command("features", "search", *given, "--feature", 5, "--feature", 2, "-k", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    expected = features.search(model, features.load(folder / "sae"), TEXTS, 2, [2, 5], rows=2, length=12)
    assert found["tokens"] == expected.tokens
    assert [each["feature"] for each in found["features"]] == [5, 2]
    for each in found["features"]:
        own = expected[each["feature"]]
        assert (each["count"], each["neuronpedia"]) == (own.count, None)
        assert [one["offset"] for one in each["examples"]] == [one.offset for one in own.examples]
        assert [one["before"] + one["token"] for one in each["examples"]] == [
            one.before + one.token for one in own.examples
        ]
        np.testing.assert_allclose(
            [logit for _, logit in each["top_logits"]], [v for _, v in own.top_logits], rtol=1e-4
        )
    assert [one["feature"] for one in found["features"][0]["coactive"]] in ([2], [])
    listed = ("features", "search", TINY, folder / "sae", folder / "store", "--most", 3, "--state", folder / "state")
    done = command(*listed)
    assert done.returncode == 0, done.stderr
    assert "24 features" in done.stdout
    assert "active on" in done.stdout
    assert command(*listed).stdout == done.stdout
    done = command(*listed, "-k", 3)
    assert (done.returncode, done.stdout) == (1, "")
    assert "k is 3, and was 10" in done.stderr
    done = command("features", "search", *given, "--feature", 5)
    assert f"[{expected[5].examples[0].token!r}]" in done.stdout


def test_check(command, folder):
    """A table, or JSON; the exit code says whether another site is explained better."""
    given = (TINY, folder / "exact", folder / "corpus.jsonl", "--field", "body", "--dtype", "float32")
    done = command("features", "check", *given, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["site"] == SITE
    assert report["fvu"] < 1e-6
    assert report["better"] == {}
    done = command("features", "check", TINY, folder / "sae", folder / "corpus.jsonl", "--field", "body")
    assert done.returncode == 1
    assert ", BETTER" in done.stdout
    assert SITE in done.stdout


def test_dashboard(command, folder, tmp_path):
    """Pages of the features with the largest values, or of those that are named, with labels."""
    given = (TINY, folder / "sae", folder / "store")
    (tmp_path / "labels.json").write_text('{"5": "a label", "6": "of no page"}')
    done = command(
        "features", "dashboard", *given, tmp_path / "a", "--feature", 5, "--labels", tmp_path / "labels.json", "-k", 2
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'a' / 'index.html'}\n"), done.stderr
    assert "a label" in (tmp_path / "a" / "index.html").read_text()
    assert command("features", "dashboard", *given, tmp_path / "b", "--most", 2, "-k", 1).returncode == 0
    assert len(list((tmp_path / "b").iterdir())) == 3


def test_train(command, folder, tmp_path):
    """A dictionary at the site of the store, in either format, that the library loads."""
    for form in ("gemma_scope", "saelens"):
        given = (folder / "store", tmp_path / form, "--width", 16, "-k", 2, "--batch", 16, "--steps", 3)
        done = command("features", "train", *given, "--format", form, "--model-name", "mine")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("step 3: loss")
        one = features.load(tmp_path / form)
        assert (one.site_in, one.width) == (SITE, 16)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("search", "sae", "corpus.jsonl", "--feature", "x"), "the feature is 'x'"),
        (("search", "sae", "corpus.jsonl", "--feature", "24"), "has 24 features"),
        (("search", "sae", "corpus.jsonl", "--feature", "1/2"), "give one index"),
        (("search", "sae", "corpus.jsonl", "-k", 0), "--examples is 0"),
        (("search", "sae", "corpus.jsonl", "--most", 0), "--most is 0"),
        (("search", "sae", "corpus.txt", "--field", "body"), "--field is for"),
        (("search", "sae", "absent.txt"), "absent.txt"),
        (("search", "sae", "corpus.jsonl", "--state", "no/state"), "no is not a directory"),
        (("search", "absent", "corpus.jsonl"), "absent"),
        (("search", "sae", "corpus.jsonl", "--site-in", "blocks.9.hook_out", "--site-out", "blocks.9.hook_out"), "9"),
        (("search", "sae", "corpus.jsonl", "--dtype", "float64"), "dtype is 'float64'"),
        (("check", "sae", "corpus.jsonl", "--documents", 0), "--documents is 0"),
        (("check", "sae", "corpus.jsonl", "--length", 1), "--length is 1"),
        (("dashboard", "sae", "corpus.jsonl", "sae"), "is not empty"),
        (("dashboard", "sae", "corpus.jsonl", "out", "--labels", "labels.json"), "a text for each feature"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_loads(command, folder, monkeypatch, arguments, says):
    """With one line that names the thing."""
    monkeypatch.chdir(folder)
    (folder / "labels.json").write_text('{"5": 7}')
    (folder / "corpus.txt").write_text("ba ke\n")

    def load(*arguments, **options):
        raise SystemExit("a model was loaded")

    monkeypatch.setattr("gemma3_jax.hooked.loading.assemble", load)
    name, *rest = arguments
    done = command("features", name, TINY, *rest)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert says in line
    assert not (folder / "out").exists()
    done = command("features", "search", TINY, "sae", "corpus.jsonl", "--feature", 5)  # control
    assert done.returncode == "a model was loaded"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "pickle"), "--format is 'pickle'"),
        (("--kind", "topk"), "with --kind topk"),
        (("--kind", "relu"), "kind is 'relu'"),
        (("--site-in", "blocks.3.hook_out"), "was not harvested"),
    ],
)
def test_bad_options_of_train(command, folder, tmp_path, options, says):
    """Nothing is trained or written."""
    done = command("features", "train", folder / "store", tmp_path / "out", "--width", 16, *options)
    assert done.returncode == 1
    assert says in done.stderr
    assert not (tmp_path / "out").exists()
