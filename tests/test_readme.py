"""What README.md and the cards say is what the code and the study have."""

import json
import re
from dataclasses import asdict

from conftest import ROOT

from aggrevated import Config

README, STUDY = (ROOT / "README.md").read_text(), ROOT / "logs/reference"


def cells(text):
    """The cells of the table rows that have three decimal numbers or more."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [{x.strip() for x in row} for row in rows if len(re.findall(r"\d\.\d", str(row))) > 2]


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


def test_results_are_those_of_the_study():
    """The page that is written from the study's tables has them, perhaps in longer rows."""
    results, study = cells(README), cells((STUDY / "README.md").read_text())
    assert len(results) > 5 and all(any(row <= x for x in study) for row in results)


def test_cards_have_the_scores_of_the_agents():
    cards = (ROOT / "rl-trained-agents/README.md").read_text()
    for path in (ROOT / "rl-trained-agents/sac").glob("*/score.json"):
        card = json.loads(path.read_text())
        mean, error = card["score"]["mean"], card["score"]["standard_error"]
        assert f"| {path.parent.name} | {mean:.1f} ± {error:.1f} |" in cards, path
        assert card["sha256"][:16] in cards, path
