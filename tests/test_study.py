"""README, cards and study: they say what code and numbers say, and rows can be gone on with."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from conftest import ROOT

import common
import draw
import study
from aggrevated import AggreVateDAgent, Config, load_policy

README, STUDY = (ROOT / "README.md").read_text(), ROOT / "logs/reference"
TINY = dict(env_name="Pendulum-v1", K=2, H=40, max_iteration=3, eval_every=1, eval_episodes=2)
TINY |= dict(hidden_dim=16, update_sz=100, batch_sz=32)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty study with an expert and its row."""
    for module in (common, study):
        monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(study, "RUNS", tmp_path / ".runs")
    for name in ("returns", "evaluations"):
        header = (ROOT / "logs/reference" / f"{name}.csv").read_text().split("\n")[0]
        (tmp_path / f"{name}.csv").write_text(header + "\n")
    monkeypatch.setitem(common.ROWS, "tiny_expert", dict(options=TINY, episodes=2))
    row = dict(expert="tiny_expert", options=dict(K=3), seeds=[4], keep=[4])
    monkeypatch.setitem(common.ROWS, "tiny", row)
    return tmp_path


def test_page_is_printed_from_the_committed_numbers():
    template = (draw.HERE / "template.md").read_text()
    assert draw.fill(template) == (draw.HERE / "README.md").read_text()
    known = {"mean", "minus", "solved", "failed", "steps", "gap", "states", "rank"}
    known |= set(draw.tables())
    allowed = set(common.ROWS) | {"20", "60", "0", "1", "advantage", "advantage_zip"}
    for name, arguments in re.findall(r"\{(\w+)([^}]*)\}", template):  # a wrong one is left out
        assert name in known and set(arguments.split()) <= allowed


def test_rows_are_legal():
    allowed = "name expert options seeds terrains keep episodes start_from script".split()
    for name, row in common.ROWS.items():
        config = Config(**common.options_of(name)).check()
        assert set(row) <= set(allowed) and set(row.get("keep", [])) <= set(row.get("seeds", []))
        assert not config.expert_path.startswith("/") and not config.init_path
        assert common.expert_of(common.expert_of(name)) == common.expert_of(name)
        assert row.get("start_from", name) in common.ROWS
        assert set(row.get("terrains", [])) <= set(common.TERRAINS)
    assert len(common.PRINTED["main"]) <= 10


def test_killed_row_goes_on_and_a_finished_one_is_not_run_again(place, monkeypatch):
    keep = AggreVateDAgent.keep

    def kill(self, new):
        if self.iteration == 2:
            raise KeyboardInterrupt
        keep(self, new)

    monkeypatch.setattr(AggreVateDAgent, "keep", kill)
    with pytest.raises(SystemExit, match="the same command goes on"):
        study.run_row("tiny", terrains="validation")
    assert {x["row"] for x in common.read("returns")} == {"tiny_expert"}
    monkeypatch.setattr(AggreVateDAgent, "keep", keep)
    study.run_row("tiny", terrains="validation")
    assert len(list(place.glob(".runs/tiny_s4/*/last.pt"))) == 1
    assert {x["row"] for x in common.read("returns")} == {"tiny_expert", "tiny"}
    assert {x["iteration"] for x in common.read("evaluations")} == {"1", "2", "3"}
    assert study.ag.load_policy(place / "policies" / "tiny_s4.pt").w["fc1.weight"].shape[0] == 16
    monkeypatch.setattr(study.ag, "main", lambda _: pytest.fail("it was run again"))
    study.run_row("tiny", terrains="validation")


def test_documented_options_exist():
    commands = re.findall(r"python aggrevated\.py([^#\n]*)", README.replace("\\\n", " "))
    options = re.findall(r"\s--([\w-]+)", "\n".join(commands)) + re.findall(r"`--([\w-]+)", README)
    known = asdict(Config()).keys() | {"resume", "evaluate", "help"}
    assert len(commands) > 3 and set(options) <= known


def test_named_files_exist():
    paths = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README)
    paths += re.findall(r"`((?:tests|logs/reference|rl-trained-agents)/[\w./-]+|\w+\.py)`", README)
    folders = ROOT, ROOT / "tests", ROOT / "rl-trained-agents", STUDY / "scripts"
    missing = [x for x in paths if "ENV" not in x and not any((d / x).exists() for d in folders)]
    assert len(paths) > 5 and not missing


def test_tensorboard_shows_one_run_of_ours():
    assert {p.parent.name for p in STUDY.glob("[!.]*/**/events.*")} == {"aggrevated_s0", "expert"}


def test_readme_has_the_tables_and_the_numbers_of_the_study():
    assert all(draw.tables()[name] in README for name in ("main", "others", "printed"))
    page = (STUDY / "README.md").read_text()
    intervals = re.findall(r"[-+][\d.]+ \([-+][\d.]+ to [-+][\d.]+\)", " ".join(README.split()))
    assert len(intervals) > 15 and all(x in page for x in intervals)


@pytest.mark.parametrize("row", ["aggrevated", "thorough", "past_expert"])
def test_committed_policy_has_the_committed_score(row):
    policy, returns = load_policy(STUDY / "policies" / f"{row}_s0.pt"), draw.returns(row)[0]
    played = [x for _, x, *_ in common.play(row, "test", policy, 6)]
    assert abs(np.mean(played) - returns.mean()) < 3 * returns.std() / 6**0.5


def test_cards_have_the_scores_of_the_agents():
    cards = (ROOT / "rl-trained-agents/README.md").read_text()
    for path in (ROOT / "rl-trained-agents/sac").glob("*/score.json"):
        card = json.loads(path.read_text())
        mean, error = card["score"]["mean"], card["score"]["standard_error"]
        assert f"| {path.parent.name} | {mean:.1f} ± {error:.1f} |" in cards, path
        assert card["sha256"][:16] in cards, path
