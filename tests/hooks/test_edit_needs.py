"""A user's own edit says what it needs, and is held to it as the ready-made ones are."""

import flax.struct
import jax
import numpy as np
import pytest

from gemma3_jax import edits
from gemma3_jax.generation import generate
from tests.helpers.greedy_texts import tiny

SITE = "blocks.1.hook_out"
TEXTS = ["ba ke lo mu ti so re ba ke", "lo mu ti"]


@flax.struct.dataclass
class Centre:
    """Subtracts the mean over the whole text."""

    needs_whole_text = True

    def __call__(self, value, hook):
        return value - value.mean(axis=1, keepdims=True)


@flax.struct.dataclass
class AtRow:
    """Doubles one row."""

    row: jax.Array | int

    def check(self, names, config, extent, new):
        if not 0 <= int(self.row) < extent.rows:
            raise ValueError(f"{names[0]} has {extent.rows} rows; this one is {self.row}")

    def __call__(self, value, hook):
        return value.at[self.row].multiply(2)


@flax.struct.dataclass
class PerPosition:
    """Adds a number at each position, by array index."""

    numbers: jax.Array

    def varies_by_position(self, axes):
        return "p" in axes

    def __call__(self, value, hook):
        return value + self.numbers[: value.shape[1], None]


def test_an_edit_that_needs_the_whole_text_does_not_see_new_tokens():
    """Restricted to the prompt it runs; a function that says nothing is not refused (control)."""
    with pytest.raises(ValueError, match=r"Centre at blocks\.1\.hook_out needs the whole text"):
        tiny().generate(TEXTS[0], 3, fwd_hooks=[(SITE, Centre())])
    tiny().generate(TEXTS[0], 3, fwd_hooks=[(SITE, edits.only(Centre(), phase="prompt"))])
    tiny().generate(TEXTS[0], 3, fwd_hooks=[(SITE, lambda value, hook: Centre()(value, hook))])
    tiny().run_with_hooks(TEXTS, [(SITE, Centre())])


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_edit_checks_itself_before_anything_runs(wrapped):
    """Restricted or not; JAX would leave out the row that is not there."""

    def edit(row):
        return edits.only(AtRow(row), positions=-1) if wrapped else AtRow(row)

    with pytest.raises(ValueError, match=r"blocks\.1\.hook_out has 2 rows; this one is 2"):
        tiny().run_with_hooks(TEXTS, [(SITE, edit(2))])
    changed = tiny().run_with_hooks(TEXTS, [(SITE, edit(1))])
    assert not np.array_equal(changed[1, -1], tiny()(TEXTS)[1, -1])


@pytest.mark.parametrize("masked", [False, True])
def test_values_for_positions_do_not_move(masked):
    """Generation aligns rows that are padded on the right, whether their mask is given or not."""
    ids = np.array([[2, 9, 7, 8], [2, 9, 0, 0]])
    edit = edits.only(PerPosition(np.ones(4, np.float32)), phase="prompt")
    hooks = [(SITE, edit)]
    model = tiny()
    pad = model.config.pad_token_id or 0
    ids[ids == 0] = pad
    how = {"attention_mask": ids != pad} if masked else {}
    with pytest.raises(ValueError, match="has values for positions of the prompt, but its rows are moved"):
        generate(model.config, model.params, ids, 2, edits={SITE: edit}, **how)
    with pytest.raises(ValueError, match="has values for positions of the prompt, but its rows are moved"):
        model.generate(ids, 2, fwd_hooks=hooks, **how)
    model.generate(ids[:1], 2, fwd_hooks=hooks)  # control: nothing moves
