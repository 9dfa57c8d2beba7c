"""What a user's function cannot do inside a compiled program is one error that names the place and the remedy."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gemma3_jax import HookedGemma3, analysis, edits, get_act_name, grad_at, patching, reductions
from gemma3_jax.hooks.indices import line_of
from tests.helpers.small_model import TOKENS, identity, small

SITE = "blocks.1.hook_out"


@functools.cache
def model():
    return HookedGemma3(*small())


class Keeper:
    """Keeps what it sees, in several places."""

    def __init__(self):
        self.values = []

    def in_a_list(self, value, hook):
        self.values.append(value)
        return value

    def a_mean(self, value, hook):
        self.values.append(value.mean())
        return value

    def behind_relu(self, value, hook):
        self.values.append(jax.nn.relu(value) + 1)
        return jax.nn.relu(value)

    def as_attribute(self, value, hook):
        self.last = value[:, -1]
        return value

    def by_position(self, value, hook):
        self.values.append({"at": hook.positions + 1})
        return value


KEEPS = ("in_a_list", "a_mean", "behind_relu", "as_attribute", "by_position")
ASKS = {
    "item": lambda value, hook: value * value.max().item(),
    "if": lambda value, hook: value if value.max() > 0 else -value,
    "while": lambda value, hook: next(value for _ in iter(lambda: bool(value.sum() > 0), True)),
    "float": lambda value, hook: value * float(value.sum()),
    "int": lambda value, hook: value.at[:, int(value.sum())].set(0.0),
    "numpy": lambda value, hook: value + np.asarray(value),
    "numpy function": lambda value, hook: np.exp(value),
    "torch": lambda value, hook: value + torch.from_numpy(np.array(value)).numpy(),
    "boolean index": lambda value, hook: value * value[value > 0].sum(),
    "tolist": lambda value, hook: value * sum(value.sum(axis=(1, 2)).tolist()),
}


def hooked(edit):
    return lambda: model().run_with_hooks(TOKENS, [(SITE, edit)])


def generated(edit):
    return lambda: model().generate(TOKENS, 2, fwd_hooks=[(SITE, edit)], stop_at_eos=False)


@pytest.mark.parametrize("run", [hooked, generated])
@pytest.mark.parametrize("kind", KEEPS)
def test_a_hook_that_keeps_values(kind, run):
    """`saved.append(value)` would keep a symbol: the error names the site and `names_filter`, at the second run too."""
    keep = getattr(Keeper(), kind)
    for _ in range(2):
        with pytest.raises(TypeError, match=rf"the edit at {SITE} stores its value, .*names_filter"):
            run(keep)()


def test_a_hook_that_keeps_no_value_may_have_side_effects():
    """Counting calls, and keeping shapes and names, is fine: the hook is called once in every run."""
    calls = []

    def hook(value, hook):
        calls.append((hook.name, value.shape))
        return jax.nn.relu(value)

    for _ in range(3):
        hooked(hook)()
    assert calls == [(SITE, (2, 9, 48))] * 3


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_a_hook_that_asks_for_numbers(ask):
    """`.item()`, `if` and NumPy need numbers: the error names the site, this file's line, and what to write instead."""
    with pytest.raises(TypeError, match=rf"the edit at {SITE} needs the numbers.*compiled program.*jnp.where") as error:
        hooked(ask)()
    assert "\n" not in str(error.value)
    assert __file__ in str(error.value)


ELSEWHERE = {
    "a restricted edit": lambda f: hooked(edits.only(lambda value, hook: value * f(value), rows=0)),
    "a reduction": lambda f: lambda: model().run_with_cache(TOKENS, {SITE: lambda value, hook: f(value)}),
    "a reduction of activations": lambda f: (
        lambda: list(model().activations([TOKENS], {SITE: lambda value, hook: f(value) * value}))
    ),
    "loss_fn": lambda f: lambda: model().run_with_cache(TOKENS, SITE, incl_bwd=True, loss_fn=f),
    "a sweep's metric": lambda f: (
        lambda: analysis.sweep(model(), TOKENS, lambda item: {SITE: edits.Scale(item)}, np.ones(2), f)
    ),
    "a sweep's edits": lambda f: (
        lambda: analysis.sweep(
            model(), TOKENS, lambda item: {SITE: edits.Scale(f(item))}, np.ones(2), lambda logits: logits[0, -1, 3]
        )
    ),
    "an edit of a sweep": lambda f: (
        lambda: analysis.sweep(
            model(),
            TOKENS,
            lambda item: {SITE: lambda value, hook: value * f(value)},
            np.ones(2),
            lambda logits: logits[0, -1, 3],
        )
    ),
    "a patching metric": lambda f: lambda: patching.get_act_patch_resid_pre(model(), TOKENS, TOKENS, f),
    "an attribution metric": lambda f: (
        lambda: analysis.attribution_patching(model(), TOKENS, TOKENS, f, "resid_pre", ("layer", "pos"))
    ),
}


@pytest.mark.parametrize("make", ELSEWHERE.values(), ids=ELSEWHERE)
def test_every_entry_says_so(make):
    """Keeping values and asking for numbers is refused wherever a user's function runs."""
    kept = []
    with pytest.raises(TypeError, match=r"needs the numbers.*test_functions_refused"):
        make(lambda x: x.sum().item())()
    with pytest.raises(TypeError, match="stores its value"):
        make(lambda x: kept.append(x.sum()) or x.sum())()
    make(lambda x: x.sum())()  # control


def last(logits):
    return logits[0, -1, 3]


SWAPPED = {
    "attribution_patching": lambda: analysis.attribution_patching(model(), TOKENS, TOKENS, "z", last, ("layer",)),
    "activation_patching": lambda: analysis.activation_patching(model(), TOKENS, TOKENS, "z", last, ("layer",)),
    "edge_attribution": lambda: analysis.edge_attribution(model(), TOKENS, TOKENS, "z"),
    "get_act_patch": lambda: patching.get_act_patch_resid_pre(model(), TOKENS, TOKENS, SITE),
    "grad_at": lambda: grad_at(*small(), TOKENS, last, SITE),
    "integrated_gradients": lambda: analysis.integrated_gradients(model(), TOKENS, last, SITE),
    "loss_fn": lambda: model().run_with_cache(TOKENS, SITE, incl_bwd=True, loss_fn=SITE),
    "sweep": lambda: analysis.sweep(model(), TOKENS, np.ones(2), lambda item: {SITE: edits.Scale(item)}, last),
}


@pytest.mark.parametrize("call", SWAPPED.values(), ids=SWAPPED)
def test_something_else_in_the_place_of_a_function_or_a_name(call):
    """Arguments in another order are refused by name, not by Python's raw error."""
    with pytest.raises(
        TypeError, match=r"(the metric|loss_fn|edits) is .*; it must be a function|does not name a site"
    ):
        call()


@pytest.mark.parametrize("name", [3, None, ("z", 1), last], ids=["number", "None", "pair", "function"])
def test_a_name_that_is_not_text(name):
    """In functions that take one name."""
    with pytest.raises(TypeError, match="does not name a site: give a name"):
        analysis.integrated_gradients(model(), TOKENS, name, last)
    with pytest.raises(TypeError, match="does not name a site: give a name"):
        get_act_name(name, 1)


@pytest.mark.parametrize("names", [3, None, [3]], ids=["number", "None", "list"])
def test_names_that_are_not_text(names):
    """In functions that take several."""
    with pytest.raises(TypeError, match="does not name sites"):
        model().activations([TOKENS], names)


def test_in_place_and_forgotten_returns():
    """A hook in torch's manner, which writes into its value or returns nothing, is told of the site."""

    def in_place(value, hook):
        value[:, 0] = 0.0
        return value

    with pytest.raises(TypeError, match="immutable") as error:
        hooked(in_place)()
    assert any(SITE in note for note in error.value.__notes__)
    with pytest.raises(TypeError, match=f"{SITE} returned None"):
        hooked(lambda value, hook: None)()


def test_a_hook_on_a_leaked_value_of_another_program():
    """A symbol kept from elsewhere has no numbers either; the error names the site."""
    kept = []
    jax.jit(lambda x: kept.append(x) or x)(1.0)
    with pytest.raises(TypeError, match=f"the edit at {SITE} uses a value from another"):
        hooked(lambda value, hook: value * kept[0])()


INDICES = {
    "a number": (lambda x: x[0, 50], 50, 9),
    "a negative number": (lambda x: x[0, -10], -10, 9),
    "a list": (lambda x: x[0, [1, 9]], 9, 9),
    "an array of NumPy": (lambda x: x[0, np.array([3, 500])], 500, 9),
    "an array of JAX": (lambda x: x[0, jnp.array([3, 500])], 500, 9),
    "a scalar of NumPy": (lambda x: x[np.int64(2)], 2, 2),
    "two arrays": (lambda x: x[jnp.array([0, 1]), jnp.array([3, 44])], 44, 9),
    "a slice by dynamic_slice": (lambda x: jax.lax.dynamic_slice_in_dim(x, 6, 5, axis=1), 6, 9),
    "in a jitted function": (lambda x: jax.jit(lambda y: y[0, 9])(x), 9, 9),
    "under vmap": (lambda x: jax.vmap(lambda row: row[9])(x), 9, 9),
    "in a gradient": (lambda x: jax.grad(lambda y: y[0, 9].sum())(x), 9, 9),
    "set": (lambda x: x.at[:, 9].set(0.0), 9, 9),
    "add": (lambda x: x.at[:, -10].add(1.0), -10, 9),
    "multiply": (lambda x: x.at[0, 30].multiply(2.0), 30, 9),
    "set several": (lambda x: x.at[:, jnp.arange(10)].set(0.0), 9, 9),
    "dynamic_update_slice": (lambda x: jax.lax.dynamic_update_slice_in_dim(x, x[:, :2], 8, axis=1), 8, 9),
}
IN_RANGE = {
    "the last": lambda x: x[0, -9],
    "a slice that ends behind": lambda x: x[:, 5:50],
    "computed": lambda x: x[0, jnp.argmax(x[0, :, 0])],
    "mode fill": lambda x: x.at[0, 50].get(mode="fill", fill_value=0.0),
    "take with mode fill": lambda x: jnp.take(x, 50, axis=1, mode="fill"),
    "the library's own": lambda x: (jnp.roll(x, 3, 1), jnp.sort(x, 1)[:, -1], jnp.quantile(x, 0.9), jnp.gradient(x)),
    "one_hot and where": lambda x: jnp.where(jax.nn.one_hot(3, 9)[None, :, None] > 0, x, 0.0),
}


@pytest.mark.parametrize(("index", "bad", "size"), INDICES.values(), ids=INDICES)
def test_an_index_out_of_range(index, bad, size):
    """JAX would clamp or drop it; here it is refused in metrics, hooks and reductions, with its line, before a run."""
    says = rf"index {bad} on an axis of size {size} \(.*{__name__}.*:\d+, in"
    zero = 0 * jnp.float32(1)
    calls = (
        lambda: hooked(lambda value, hook: value + zero * index(value).sum())(),
        lambda: model().run_with_cache(TOKENS, {SITE: lambda value, hook: index(value)}),
        lambda: model().run_with_cache(TOKENS, SITE, incl_bwd=True, loss_fn=lambda x: index(x).sum()),
        lambda: analysis.sweep(model(), TOKENS, lambda item: {SITE: edits.Scale(item)}, np.ones(2), index),
    )
    for call in calls:
        with pytest.raises(ValueError, match=says):
            call()


@pytest.mark.parametrize("index", IN_RANGE.values(), ids=IN_RANGE)
def test_an_index_in_range(index):
    """What is in range, or says what to do out of range, passes."""
    model().run_with_cache(TOKENS, {SITE: lambda value, hook: index(value)})


def test_the_index_may_come_from_an_array_that_changes():
    """An array of indices is data: a good one runs, and the next one is looked at again."""
    places = np.array([1, 2])

    def at_places(value, hook):
        return value.at[:, places].set(0.0)

    hooked(at_places)()
    places[1] = 9
    with pytest.raises(ValueError, match="index 9 on an axis of size 9"):
        hooked(at_places)()
    places[1] = 8
    hooked(at_places)()


ITEMS = {
    "layer": ({"layer": [0, 99]}, "edit of layer 99"),
    "a negative layer": ({"layer": [0, -1]}, "edit of layer -1"),
    "head": ({"heads": [1, 8]}, "heads has 8; .* there are 8"),
    "position": ({"positions": [0, 50]}, "positions has 50; .* there are 9"),
    "a negative position": ({"positions": [-1, -10]}, "positions has -10"),
    "row": ({"rows": [0, 2]}, "rows has 2; .* there are 2"),
    "feature": ({"features": [0, 10]}, "features has 10"),
    "one of several": ({"heads": [[0, 1], [2, 8]]}, "heads has 8"),
}


@pytest.mark.parametrize(("items", "says"), ITEMS.values(), ids=ITEMS)
def test_items_of_a_sweep_out_of_range(items, says):
    """A place that is not there would have no effect, and look like a result: it is refused before anything runs."""

    def ablated(item):
        return {"blocks.*.attn.hook_z": edits.only(edits.Replace(0.0), **item)}

    def nested(item):
        return {"blocks.*.attn.hook_z": [edits.Scale(1.0), edits.only(edits.only(identity, rows=0), **item)]}

    for make in (ablated, nested):
        with pytest.raises(ValueError, match=says):
            analysis.sweep(model(), TOKENS, make, items, lambda logits: logits[0, -1, 3], progress=False)
        good = {name: np.asarray(index)[:1] for name, index in items.items()}
        if np.all(np.asarray(good.get("layer", 0)) >= 0):
            analysis.sweep(model(), TOKENS, make, good, lambda logits: logits[0, -1, 3], progress=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda item: {SITE: lambda value, hook: value.at[:, item].set(0.0)},
        lambda item: {SITE: edits.Replace(jnp.ones((3, 48))[item])},
        lambda item: {SITE: edits.FromRow(item)},
    ],
    ids=["in a function", "of the user's own array", "FromRow"],
)
def test_items_that_index(make):
    """What `edits` itself does with an item is checked as well, item by item."""

    def run(items):
        return analysis.sweep(model(), TOKENS, make, np.asarray(items), lambda logits: logits[0, -1, 3], progress=False)

    assert np.isfinite(run([0, 1])).all()
    with pytest.raises(ValueError, match=r"index 50|row.* has 50"):
        run([0, 50])


def test_a_metric_that_returns_a_vector_is_refused_before_the_sweep(monkeypatch):
    """Patching and attribution measure one number; the sweep does not begin."""
    from gemma3_jax.analysis import sweeps

    ran = []
    execute = sweeps.run_compiled
    monkeypatch.setattr(
        sweeps,
        "run_compiled",
        lambda function, *rest, **static: ran.append(function) or execute(function, *rest, **static),
    )
    for call in (
        lambda metric: patching.get_act_patch_resid_pre(model(), TOKENS, TOKENS, metric),
        lambda metric: analysis.path_patching(model(), TOKENS, TOKENS, metric, [("logits",)], [("embed",)]),
        lambda metric: analysis.attribution_patching(model(), TOKENS, TOKENS, metric, "z", ("layer",)),
        lambda metric: analysis.edge_attribution(model(), TOKENS, TOKENS, metric),
        lambda metric: analysis.integrated_gradients(model(), TOKENS, "hook_embed", metric),
    ):
        with pytest.raises(ValueError, match=r"returned float32 of shape \(101,\)"):
            call(lambda logits: logits[0, -1])
    assert not ran


@pytest.mark.parametrize(
    ("folder", "is_user"),
    [
        ("jax/numpy", False),
        ("einops", False),
        ("jaxtyping_of_mine", True),
        ("numpyro", True),
        ("gemma3_jax_examples", True),
    ],
)
def test_the_line_is_one_of_the_user(folder, is_user):
    """Frames of the libraries are passed over; a package whose name only begins like theirs is the user's."""
    source = Path(jax.__file__).parents[1] / folder / "inside.py"

    def fail(file: Path) -> None:
        exec(compile("def inside():\n    raise IndexError\ninside()", str(file), "exec"), {})

    with pytest.raises(IndexError) as error:
        fail(source)
    assert (str(source) in line_of(error.tb)) == is_user


@pytest.mark.parametrize(
    "hook",
    [
        lambda v, _: jax.lax.scan(lambda c, _: (c + c[0, 50, 0], None), v, None, length=2)[0],
        lambda v, _: jax.lax.cond(v[0, 0, 0] > 0, lambda v: v + v[0, 50, 0], lambda v: v, v),
        lambda v, _: jax.lax.fori_loop(0, 2, lambda i, v: v.at[:, 50].set(0), v),
    ],
    ids=["scan", "cond", "fori_loop"],
)
def test_an_index_out_of_range_in_the_body_of_a_loop_or_branch(hook):
    """These functions were not searched."""
    with pytest.raises(ValueError, match="index 50 on an axis"):
        model().run_with_hooks(TOKENS, [(SITE, hook)])


def test_a_cast_that_drops_fractions_is_refused():
    """`Cast("int8")` of activations gave zeros and ones."""
    with pytest.raises(ValueError, match="drop the fractions"):
        model().run_with_cache(TOKENS, {SITE: reductions.Cast("int8")})
