"""What README.md and the cards say is what the code and the logs have."""

import json
import re
from dataclasses import fields

from conftest import ROOT

from aggrevated import Config

README = (ROOT / "README.md").read_text()


def test_documented_options_exist():
    text = README.replace("\\\n", " ")  # commands over several lines
    commands = re.findall(r"^[ $]*python aggrevated\.py(.*)$", text, re.MULTILINE)
    assert commands
    known = {f.name for f in fields(Config)} | {"resume", "evaluate", "help"}
    for command in commands:
        assert set(re.findall(r"(?<=\s)--([\w-]+)", command.split("#")[0])) <= known, command


def test_named_files_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README)
    paths = re.findall(r"`((?:tests|logs/reference|rl-trained-agents)/[\w./-]+|\w+\.py)`", README)
    assert links or paths
    for path in links + paths:
        here = [folder / path for folder in (ROOT, ROOT / "logs/reference", ROOT / "tests")]
        assert "/runs/" in path or "ENV" in path or any(p.exists() for p in here), path


def test_results_are_those_of_the_study():
    """The page that draw.py writes from the logs has every row of the README's result tables."""
    study = (ROOT / "logs" / "reference" / "README.md").read_text().splitlines()
    rows = [line for line in README.splitlines() if line.startswith("|") and " × " in line]
    assert len(rows) >= 6 and set(rows) <= set(study)


def test_cards_have_the_scores_of_the_agents():
    cards = (ROOT / "rl-trained-agents" / "README.md").read_text()
    for path in (ROOT / "rl-trained-agents" / "sac").glob("*/score.json"):
        card = json.loads(path.read_text())
        score = card["score"]
        mean = f"| {path.parent.name} | {score['mean']:.1f} ± {score['standard_error']:.1f} |"
        assert mean in cards and card["sha256"][:16] in cards
