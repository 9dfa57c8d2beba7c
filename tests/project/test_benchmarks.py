"""The benchmark suite runs from end to end, so that it cannot rot, and its ratios follow what they measure."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks import forward, parts, report
from benchmarks.limits import shares
from benchmarks.rows import Figure, Row, Settings, forward_flops, narrow
from gemma3_jax import Gemma3

ROOT = Path(__file__).parents[2]


def test_quick_suite(tmp_path):
    """`python -m benchmarks --quick` measures everything, and its report makes a page."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert set(found["benchmarks"]) == set(report.TITLES)
    rows = [row for rows in found["benchmarks"].values() for row in rows]
    assert all(row["seconds"]["port"] > 0 for row in rows)
    assert all(math.isfinite(figure["value"]) for row in rows for figure in row["figures"])
    assert min(found["limits"].values()) > 0
    page = report.page([file])
    assert all(f"## {title}" in page for title in report.TITLES.values())


def test_a_slower_port_has_a_lower_ratio(monkeypatch):
    """The ratio is the peers' time over the port's: half a second of sleep must show in it."""
    plain = forward.logits_of

    def slow(*arguments):
        time.sleep(0.5)
        return plain(*arguments)

    monkeypatch.setattr(forward, "logits_of", slow)
    row = next(forward.rows(Settings("quick", ("float32",), 1)))
    assert row.seconds["port"] > 0.5
    assert row.figures[0].value < 0.5
    assert not row.figures[0].met


def test_committed_page_is_that_of_the_results():
    """docs/benchmarks.md is generated: what it says is in the committed results."""
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.page()


def test_the_page_begins_with_every_goal(tmp_path):
    """What all runs of a shape have reached stands beside it, in bold where that falls short; no goal, no line."""
    files = []
    for value in (2.0, 0.5):
        figures = Figure("best peer / port", value, 1.0), Figure("beside", value)
        row = Row("case", "float32", {"port": 1.0}, figures).as_dict()
        files.append(tmp_path / f"{value}.json")
        run = {"command": "run", "size": "1b", "machine": {"device": "cpu"}, "limits": {}}
        report.write(run | {"benchmarks": {"forward": [row]}}, files[-1])
    goals = report.page(files).split("# Goals")[1].split("# 1b")[0]
    assert "| Forward: best peer / port | at least 1 | 2, **0.5** |" in goals
    assert "beside" not in goals


def test_operations_of_a_forward_pass():
    """The formula counts what XLA counts, but for norms, softmax and the like; the control counts a layer too few."""
    config, tokens = narrow(6), jax.ShapeDtypeStruct((1, 16), "int32")
    shapes = jax.eval_shape(lambda: Gemma3(config).init(jax.random.key(0), jax.numpy.zeros((1, 2), int)))["params"]
    counted = jax.jit(lambda p, t: forward.forward(config, p, t)[0]).lower(shapes, tokens).compile().cost_analysis()
    assert forward_flops(config, 1, 16) == pytest.approx(counted["flops"], rel=0.1)
    assert forward_flops(narrow(5), 1, 16) != pytest.approx(counted["flops"], rel=0.1)


def test_products_alone_are_those_of_a_forward_pass():
    """They have its operations, but for the few of attention; those of a layer less are fewer."""
    config, x = narrow(6), jax.ShapeDtypeStruct((1, 2, narrow(6).hidden_size), "float32")
    shapes = jax.eval_shape(lambda: Gemma3(config).init(jax.random.key(0), jax.numpy.zeros((1, 2), int)))["params"]
    counted = parts.products.lower(config, shapes, x, True).compile().cost_analysis()
    assert forward_flops(config, 1, 2) == pytest.approx(counted["flops"], rel=0.05)
    assert forward_flops(narrow(5), 1, 2) != pytest.approx(counted["flops"], rel=0.05)


def test_attention_alone_is_that_of_every_layer():
    """It has the operations of all its scores and mixtures, but for the softmax; those of a layer more are more."""
    config = dataclasses.replace(narrow(6), head_dim=64)
    shapes = [jax.ShapeDtypeStruct((1, 16, n, 64), "float32") for n in (4, 1, 1)]
    counted = parts.attention.lower(config, *shapes).compile().cost_analysis()
    assert counted["flops"] == pytest.approx(6 * 4 * 16 * 16 * 4 * 64, rel=0.1)
    assert counted["flops"] != pytest.approx(7 * 4 * 16 * 16 * 4 * 64, rel=0.1)


def test_goals_and_shares():
    """A goal is met on its own side; a share is that of the time which the limit alone would take."""
    assert Figure("ratio", 2.0, 1.5).met
    assert not Figure("ratio", 1.0, 1.5).met
    assert Figure("added", 0.01, 0.03, at_least=False).met
    assert Figure("seconds", 1.0).met is None
    row = {"dtype": "float32", "flops": 10.0, "bytes": 1.0, "seconds": {"port": 2.0}}
    limits = {"float32 operations": 10.0, "bytes read": 10.0}
    assert shares(row, limits) == {"operations": 0.5, "bandwidth": 0.05}
    assert shares(row | {"flops": 0}, limits) == {"bandwidth": 0.05}
    assert shares(row | {"dtype": "float16"}, limits) == {"bandwidth": 0.05}  # whose rate was not measured


def test_a_share_below_its_goal_is_missed():
    """The column shows the goal, and the run says that it was missed; at the goal it is met."""
    row = Row("case", "float32", {"port": 2.0}, bytes=10.0, share_goal=0.7).as_dict()
    said = "decode, case, float32: bandwidth **50.0 % (goal: at least 70.0 %)**"
    for limit, missed in ((10.0, [said]), (5.0, [])):
        assert report.missed({"limits": {"bytes read": limit}, "benchmarks": {"decode": [row]}}) == missed
