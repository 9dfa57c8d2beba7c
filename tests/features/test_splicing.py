"""Dictionaries in the model: captures of features, reconstructions, changed features and steering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import HookedGemma3, features, forward, stack_layers
from tests.features.small_dictionaries import D, F, clt, crosscoder, sae, transcoder
from tests.helpers.programs import programs
from tests.helpers.random_models import SMALL
from tests.helpers.small_model import TOKENS, assert_same, difference, plain, run, small

SITES = "blocks.*.ln2*.hook_out"
HEADS = "blocks.1.attn.o.hook_in"


def of_heads(**more):
    """An autoencoder of all heads' values together."""
    return sae(HEADS, d=SMALL["num_attention_heads"] * SMALL["head_dim"], **more)


KINDS = {
    "relu": sae,
    "topk": lambda: sae(activation=features.TopK(3)),
    "groups": lambda: sae(activation=features.GroupMax(4)),
    "layer_norm": lambda: sae(normalization=features.LayerNorm(), subtracts_b_dec=True),
    "unit_norm": lambda: sae(normalization=features.UnitNorm()),
    "transcoder": lambda: transcoder(skip=0.2 * jnp.eye(D)),
    "heads": of_heads,
    "clt": clt,
    "crosscoder": crosscoder,
}


@pytest.mark.parametrize("kind", ["relu", "topk", "transcoder", "heads"])
def test_the_error_term_keeps_the_model(kind):
    """With it nothing changes; without it the value is the reconstruction, and the logits are others."""
    one = KINDS[kind]()
    logits, values = plain()
    assert_same(run(edits=[features.splice(one)])[0], logits, 1e-6)
    without, cache = run(one.site_out, [features.splice(one, error=False)])
    read = values[one.site_in]
    assert_same(cache[one.site_out], one(read).reshape(values[one.site_out].shape))
    assert difference(without, logits) > 1e-3


@pytest.mark.parametrize("kind", ["relu", "topk", "groups", "layer_norm", "unit_norm", "transcoder", "heads"])
@pytest.mark.parametrize("error", [True, False])
def test_changed_features_change_the_value_by_their_decoder_rows(kind, error):
    """Of every kind of activation and normalization: what decoding the changed features gives, plus the error."""
    one, (_, values) = KINDS[kind](), plain()
    x, y = values[one.site_in], values[one.site_out]
    f = one.encode(x)
    active = 8 + int(jnp.argmax(jnp.sum(f[..., 8:], (0, 1))))
    new = f.at[..., 3].set(2.0).at[..., active].multiply(0.5).at[..., 5].set(0.0)
    expected = one.decode(new, x).reshape(y.shape)
    if error:
        expected = expected + y - one(x).reshape(y.shape)
    edit = features.splice(one, error, set={3: 2.0}, scale={active: 0.5}, ablate=[5])
    found = run(one.site_out, [edit])[1][one.site_out]
    assert_same(found, expected)
    assert difference(found, y) > 1e-3


def test_positions_rows_and_values_of_another_run():
    """`positions` and `only` restrict; values may be those of each token: activation patching of features."""
    one, (_, values) = sae(), plain()
    y = values[one.site_out]
    found = run(one.site_out, [features.splice(one, ablate=[2], positions=-1, only={"rows": [0]})])[1][one.site_out]
    changed = np.abs(found - y).max(-1) > 0
    assert not changed[1].any()
    assert not changed[0, :-1].any()
    other = jnp.roll(one.encode(y)[..., 2], 1, 0)
    found = run(one.site_out, [features.splice(one, set={2: other})])[1][one.site_out]
    assert_same(found, y + (other - one.encode(y)[..., 2])[..., None] * one.W_dec[2])


def test_a_cross_layer_transcoder_reads_the_run_that_it_changes():
    """Its outputs are those for the inputs of the same run, in which earlier outputs are already its own."""
    one = clt()
    _, cache = run(SITES, features.splice(one, error=False))
    outputs = one(cache)
    for name, output in zip(one.site_out, outputs, strict=True):
        assert_same(cache[name], output)
    _, values = plain()
    _, cache = run(SITES, [features.splice(one, set={(0, 3): 4.0})])
    change = 4.0 - one.encode(values)[0, ..., 3, None]
    assert_same(cache[one.site_out[0]], values[one.site_out[0]] + change * one.W_dec[0][3, 0])
    mapped = one.replace(W_dec=tuple(map(np.asarray, one.W_dec)))  # as `load` leaves them in the file
    assert_same(run(SITES, features.splice(mapped, set={(0, 3): 4.0}))[1][one.site_out[1]], cache[one.site_out[1]])


def test_several_dictionaries_at_once():
    """A transcoder reads what an autoencoder has written, in the same run."""
    first, second = sae("blocks.1.ln2.hook_out", 5), transcoder()
    _, cache = run(SITES, [features.splice(first, error=False), features.splice(second, error=False)])
    assert_same(cache[second.site_out], second(first(plain()[1][first.site_in])))


def test_scanned_layers_give_the_same_or_say_that_they_cannot():
    """A transcoder's sites are in one layer; those of a CLT are not, and a scan does not keep them."""
    config, params = small()
    stacked = stack_layers(config, params)
    edits = [features.splice(transcoder(), error=False), features.splice(sae(), set={1: 3.0})]
    assert_same(forward(config, stacked, TOKENS, edits=edits)[0], run(edits=edits)[0])
    with pytest.raises(ValueError, match="without scan_layers"):
        forward(config, stacked, TOKENS, edits=features.splice(clt(), error=False))


def test_features_of_captures_are_those_of_the_values():
    """Sparse and dense, of one layer and of several, named by one key."""
    one, several, (_, values) = sae(), clt(), plain()
    x = values[one.site_in]
    cache = run({one.site_in: features.Encode(one, k=4), several.site_in: features.Encode(several)})[1]
    found = cache[one.site_in]
    np.testing.assert_allclose(found.values, one.encode_topk(x, 4)[0], atol=1e-5)
    np.testing.assert_array_equal(found.indices, one.encode_topk(x, 4)[1])
    for name, f in zip(several.site_in, several.encode(values), strict=True):
        np.testing.assert_allclose(cache[name], f, atol=1e-5)
    assert features.Encode(several).dictionary.W_dec == ()  # which may be larger than memory


def test_numbers_are_data():
    """Other features, values and strengths run the same program, and in `generate` too."""
    model = HookedGemma3(*small())

    def results(feature, number):
        edits = [
            features.splice(transcoder(), set={feature: number}, ablate=[feature + 1]),
            features.steer(sae(), feature, number),
        ]
        return model.run_with_hooks(TOKENS, edits)

    first, before = results(3, 1.0), programs()
    assert difference(results(7, 2.5), first) > 1e-4
    assert programs() == before
    plain_ids = model.generate(TOKENS[:1], 3)
    steered = model.generate(
        TOKENS[:1], 3, fwd_hooks=[features.steer(sae(), 3, 9.0), features.splice(transcoder(), False)]
    )
    assert steered.shape == plain_ids.shape


@pytest.mark.parametrize("kind", ["relu", "heads", "clt", "crosscoder"])
def test_steering_moves_values_along_the_decoder_row(kind):
    """By a share of their length, or by units of the feature; of several layers, in proportion to their rows."""
    one = KINDS[kind]()
    layered = isinstance(one.site_in, tuple)
    f, row = ((0, 3), one.W_dec[0][3]) if layered else (3, one.W_dec[3][None])
    names = one.site_out if layered else (one.site_out,)
    _, values = plain()
    shares = np.linalg.norm(row, axis=-1)
    for relative in (True, False):
        edits = features.steer(one, f, 0.5, relative)
        before = values[names[0]].reshape(*TOKENS.shape, -1)
        after = run(names, [edits])[1][names[0]].reshape(before.shape)
        unit = row[0] / shares[0]
        size = (
            0.5 * shares[0] / shares.max() * jnp.linalg.norm(before, axis=-1, keepdims=True)
            if relative
            else 0.5 * shares[0]
        )
        assert_same(after - before, jnp.broadcast_to(size * unit, before.shape), 1e-3)


@pytest.mark.parametrize("entry", [40.0, 0.0])
def test_steering_with_rows_in_half_precision(entry):
    """A row whose square is beyond float16 moves values like the same row in float32; a row of zeros moves nothing."""
    one = sae(W_dec=jnp.full((F, D), entry * 20))
    half = one.replace(W_dec=one.W_dec.astype(jnp.float16))
    expected, actual = (run((), [features.steer(each, 3, 0.5)])[0] for each in (one, half))
    assert np.isfinite(actual).all()
    assert_same(actual, expected, 1e-5)


def test_gradients_reach_features():
    """The derivative in a value that is set is that of differences."""
    one = sae()

    def loss(value):
        return jnp.sum(run(edits=[features.splice(one, set={3: value})])[0][0, -1, :5])

    slope = jax.grad(loss)(1.0)
    assert abs(slope - (loss(1.05) - loss(0.95)) / 0.1) < 0.02 * abs(slope)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda: features.splice(sae(), set={24: 1.0}),
            "the feature is 24; the dictionary has 24 features, counted from 0",
        ),
        (lambda: features.splice(sae(), set={3: 1.0}, ablate=[3]), "feature 3 is changed twice"),
        (lambda: features.splice(sae(), ablate=3), r"ablate is 3; it takes several features, as in \[1234\]"),
        (lambda: features.splice(sae(), ablate=np.int64(3)), "it takes several features"),
        (lambda: features.splice(sae(), set=[3, 1.0]), r"set is \[3, 1.0\]; it maps features to numbers"),
        (lambda: features.splice(clt(), set={3: 1.0}), r"it is \(layer, index\)"),
        (lambda: features.splice(crosscoder()), "layers before"),
        (lambda: features.steer(sae(), [1, 2], 1.0), "give one index"),
        (lambda: run({"blocks.0.hook_out": features.Encode(sae(), k=3)}), "reads blocks.1.hook_out, not"),
    ],
)
def test_mistakes_are_named(edit, message):
    """A feature that does not exist, a change that is given twice, another site."""
    with pytest.raises(ValueError, match=message):
        edit()
