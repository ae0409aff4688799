"""What the README says is what the code and the logs say."""

import importlib.util
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import aggrevated

ROOT = Path(aggrevated.__file__).parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("f", fields(aggrevated.Config), ids=lambda f: f.name)
def test_config_table(f):
    default = f"`{f.default}`" if f.default != "" else ""
    assert f"\n| `{f.name}` | {default} | {f.metadata['note']} |\n" in README


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "logs/reference/draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    return draw


def test_results_table_is_what_the_logs_say(draw):
    table = draw.table()
    assert table.count("\n") > 5 and table in README
    ablations = draw.ablations()
    assert ablations.count("\n") > 5 and ablations in README
    for sentence in draw.sentences().split("\n"):
        assert sentence.split(": ")[1] in " ".join(README.split())


def test_speed_table_is_what_the_benchmark_saved(draw):
    assert draw.speed().count("\n") > 5 and draw.speed() in README


def test_paired_interval_is_that_of_the_normal_distribution(draw):
    """For one seed the bootstrap's interval is mean +- 1.96 standard errors."""
    rng = np.random.default_rng(0)
    expert = rng.normal(200, 100, 500)
    learner = expert[None] + rng.normal(5, 20, (1, 500))
    low, high = draw.paired_interval(learner, expert[None])
    difference = (learner - expert)[0]
    half = 1.96 * difference.std() / 500**0.5
    assert low == pytest.approx(difference.mean() - half, abs=0.2)
    assert high == pytest.approx(difference.mean() + half, abs=0.2)
