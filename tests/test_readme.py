"""What README.md and the cards say is what the code and the study have."""

import json
import re
from dataclasses import asdict

from conftest import ROOT

from aggrevated import Config

README, STUDY = (ROOT / "README.md").read_text(), ROOT / "logs/reference"


def numbers(text):
    """The cells with decimals in a text's tables of results."""
    rows = re.findall(r"^\|.*(?: × \d|\d to [-+]?\d).*$", text, re.MULTILINE)
    cells = {cell.strip() for row in rows for cell in row.split("|")}
    return {cell for cell in cells if re.search(r"\d\.\d", cell)}


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
    """The page that is written from the study's tables has them."""
    results, study = numbers(README), numbers((STUDY / "README.md").read_text())
    assert len(results) > 20 and not results - study


def test_cards_have_the_scores_of_the_agents():
    cards = (ROOT / "rl-trained-agents/README.md").read_text()
    for path in (ROOT / "rl-trained-agents/sac").glob("*/score.json"):
        card = json.loads(path.read_text())
        mean, error = card["score"]["mean"], card["score"]["standard_error"]
        assert f"| {path.parent.name} | {mean:.1f} ± {error:.1f} |" in cards, path
        assert card["sha256"][:16] in cards, path
