"""README and the study's pages: they say what code and numbers say."""

import re
from dataclasses import asdict

import pytest
from conftest import ROOT
import common
import draw
from aggrevated import Config, load_policy
from variants import VARIANTS

README, STUDY = (ROOT / "README.md").read_text(), ROOT / "logs/reference"
PAGE = (STUDY / "README.md").read_text()


def test_page_is_printed_from_the_committed_numbers():
    template = (STUDY / "template.md").read_text()
    assert draw.fill(template) == PAGE and "{" not in PAGE
    known = "mean minus chosen percent solved failed steps gap states rank".split()
    allowed = {*common.ROWS, *"20 60 0 1 last validation advantage advantage_zip".split()}
    for name, arguments in re.findall(r"\{(\w+)([^}]*)\}", template):  # a wrong one is left out
        assert name in [*known, *draw.tables()] and set(arguments.split()) <= allowed


def test_rows_are_legal():
    allowed = "name expert options seeds terrains keep episodes script variant".split()
    for name, row in common.ROWS.items():
        assert set(row) <= set(allowed) and set(row.get("keep", [])) <= set(row.get("seeds", []))
        assert not Config(**common.options_of(name)).expert_path.startswith("/")
        assert common.expert_of(common.expert_of(name)) == common.expert_of(name)
        assert row.get("variant") in VARIANTS and len(common.PRINTED["main"]) <= 10
        assert set(row.get("terrains", [])) <= set(common.TERRAINS)


def test_documented_options_named_files_and_one_run_of_ours_for_tensorboard_exist():
    commands = re.findall(r"python aggrevated\.py([^#\n]*)", README.replace("\\\n", " "))
    options = re.findall(r"\s--([\w-]+)", "\n".join(commands)) + re.findall(r"`--([\w-]+)", README)
    known = asdict(Config()).keys() | {"resume", "evaluate", "help"}
    assert len(commands) > 3 and set(options) <= known
    paths = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README)
    paths += re.findall(r"`((?:tests|logs/reference|rl-trained-agents)/[\w./-]+|\w+\.py)`", README)
    folders = ROOT, ROOT / "tests", ROOT / "rl-trained-agents", STUDY / "scripts"
    missing = [x for x in paths if "ENV" not in x and not any((d / x).exists() for d in folders)]
    assert len(paths) > 3 and not missing
    assert {p.parent.name for p in STUDY.glob("[!.]*/**/events.*")} == {"aggrevated_s0", "expert"}


def test_readme_has_the_tables_and_the_numbers_of_the_study():
    assert all(draw.tables()[name] in README for name in ("main", "printed"))
    intervals = re.findall(r"[-+][\d.]+ \([-+][\d.]+ to [-+][\d.]+\)", " ".join(README.split()))
    assert len(intervals) > 4 and all(x in PAGE for x in intervals)


KEPT = ["expert_1", *(name for name, x in common.ROWS.items() if "keep" in x)]
PLAYED = [(row, t) for row in KEPT for t in common.ROWS[row].get("terrains", ["test"])]


@pytest.mark.parametrize("row, terrains", PLAYED)
def test_committed_policies_play_the_committed_episodes(row, terrains):
    policy = load_policy(STUDY / f"policies/{row}_s0.pt") if row != "expert_1" else None
    shortest = sorted(draw.episodes(row, "best", terrains)[0], key=lambda x: int(x["length"]))[:5]
    played = common.play(row, terrains, policy, [int(x["episode"]) for x in shortest])
    for (_, total, length, end), x in zip(played, shortest, strict=True):
        assert (str(length), end) == (x["length"], x["ended_at"])
        assert total == pytest.approx(float(x["return"]), abs=0.01)
