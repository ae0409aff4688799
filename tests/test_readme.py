"""Options and files that README.md names exist."""

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
        assert "/runs/" in path or any(p.exists() for p in here), path
