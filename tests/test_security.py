"""SECURITY.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_boundary_names_tests_that_exist():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", page)
    missing = [
        f"{file}::{name}"
        for file, name in named
        if f"\ndef {name}(" not in ((ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else "")
    ]
    assert len(named) > 30 and not missing
    for section in re.split(r"^### ", page, flags=re.MULTILINE)[1:]:
        assert "::test_" in section, f"{section.splitlines()[0]}: no test"
    files = re.findall(r"`(tests/\w+\.py)`", page)
    assert all((ROOT / file).is_file() for file in files)
