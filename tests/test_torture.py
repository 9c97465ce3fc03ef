"""The harness of `make torture` runs, holds on a small part of its cases, and would find what does not hold."""

import faulthandler
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def torture(tmp_path, *arguments) -> list[dict]:
    """The results of `python -m tools.torture`."""
    command = [sys.executable, "-m", "tools.torture", "--jobs", "1", "--keep", tmp_path / "kept"]
    done = subprocess.run(
        [*map(str, command), *map(str, arguments), "--json", str(tmp_path / "found.json")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "found.json").read_text())


def test_damaged_recipes_load_or_are_refused(tmp_path):
    (found,) = torture(tmp_path, "--only", "recipes", "--cases", 200)
    assert (found["tried"], found["held"]) == (200, 200)
    assert set(found["ended"]) == {"loaded", "refused"}


def test_damaged_rows_hold(tmp_path):
    (found,) = torture(tmp_path, "--only", "rows", "--cases", 12)
    assert (found["tried"], found["held"]) == (12, 12)
    assert {"refused", "trained"} <= set(found["ended"])


@pytest.mark.slow
def test_killed_commands_hold(tmp_path):
    (found,) = torture(tmp_path, "--only", "kills", "--cases", 12)
    assert (found["tried"], found["held"]) == (12, 12)
    assert "resumed byte-equal" in found["ended"]


def test_what_does_not_hold_is_found_and_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from tools.torture.cases import BrokenPromiseError, Part, run_part

    def run(shared, chance: random.Random, place: Path, number: int) -> str:
        (place / "input.txt").write_text(str(number))
        if number == 2:
            raise BrokenPromiseError("not so")
        if number == 3:
            raise KeyError("a traceback")
        if number == 4:
            faulthandler.disable()  # or it prints where
            os.abort()
        while number == 5:
            pass
        if number == 6:
            return str(len(bytearray(1 << 33)))
        return "held"

    part = Part("odd", 7, lambda folder: None, run, seconds=2, memory=1 << 30)
    result = run_part(part, None, 1, range(1, 8), tmp_path / "work", tmp_path / "kept", 1, lambda result: None)
    assert result.tried == 7 and result.ways == {"held": 2}
    reasons = {broken["number"]: broken["why"] for broken in result.broken}
    assert reasons[2] == "not so" and "KeyError: 'a traceback'" in reasons[3] and "MemoryError" in reasons[6]
    assert reasons[4] == "the process died: -6" and reasons[5] == "not over after 2 s"
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {f"odd-1-{number}" for number in (2, 3, 4, 5, 6)}
    assert (tmp_path / "kept" / "odd-1-5" / "input.txt").read_text() == "5"
