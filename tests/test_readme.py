"""What the README says is what the code and the logs say."""

from dataclasses import fields
from pathlib import Path

import pytest

import aggrevated

ROOT = Path(aggrevated.__file__).parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("f", fields(aggrevated.Config), ids=lambda f: f.name)
def test_config_table(f):
    default = f"`{f.default}`" if f.default != "" else ""
    assert f"\n| `{f.name}` | {default} | {f.metadata['note']} |\n" in README
