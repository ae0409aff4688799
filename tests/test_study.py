"""The study: its page is what its numbers say, and its rows can be run, killed and gone on with."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

import common
import draw
import study
from aggrevated import AggreVateDAgent, Config

TINY = dict(env_name="Pendulum-v1", K=2, H=40, max_iteration=3, eval_every=1, eval_episodes=2)
TINY |= dict(hidden_dim=16, update_sz=100, batch_sz=32)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty study with an expert and its row."""
    for module in (common, study):
        monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(study, "RUNS", tmp_path / ".runs")
    monkeypatch.setattr(study.ag, "save_gif", lambda *_: None)
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
    known = {"mean", "minus", "failed", "steps", "gap", "states", "rank"}
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


def test_writers_at_once_lose_nothing_and_a_repetition_replaces_what_it_repeats(place):
    lines = [("tiny", seed, "best", "test", i, 1.5, 9, "") for seed in range(6) for i in range(30)]
    with ThreadPoolExecutor(6) as pool:  # flock is between open files, whoever has them
        list(pool.map(lambda s: common.merge("returns", lines[30 * s : 30 * s + 30]), range(6)))
    common.merge("returns", [("tiny", 3, "best", "test", 0, 2.5, 9, "pit")])
    merged = common.read("returns")
    expected = [seed for seed in range(6) for _ in range(30 - 29 * (seed == 3))]
    assert [int(x["seed"]) for x in merged] == expected
    assert [x["return"] for x in merged if x["seed"] == "3"] == ["2.5"]
    with common.lock(place / "a") as held, common.lock(place / "a", wait=False) as free:
        assert held and not free
