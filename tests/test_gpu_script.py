"""tools/gpu.sh: what it found is kept whatever happens to the rest."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu(monkeypatch):
    """The script's module."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import gpu

    return gpu


def test_a_part_that_fails_is_recorded_and_the_next_one_begins(gpu, tmp_path):
    def fails(bench):
        raise SystemExit("out of memory")

    bench = gpu.Bench(tmp_path, True, time.monotonic() + 60)
    gpu.run_part(bench, "lora", fails)
    assert json.loads((tmp_path / "results.json").read_text())["lora"]["error"] == "out of memory"
    gpu.run_part(bench, "merge", lambda bench: {"figure": 1})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["merge"]["state"] == "done" and found["merge"]["figure"] == 1
    assert "## lora failed" in (tmp_path / "summary.md").read_text()


def test_no_part_begins_when_the_time_is_up(gpu, tmp_path):
    bench = gpu.Bench(tmp_path, True, time.monotonic() + 5)
    gpu.run_part(bench, "merge", lambda bench: pytest.fail("began"))
    assert bench.results["merge"]["state"] == "no time left"


@pytest.mark.slow
def test_the_rehearsal_measures_every_part_without_a_gpu(tmp_path):
    command = [str(ROOT / "tools/gpu.sh"), "--rehearse", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHON": sys.executable, "LORAKIT_SITE": str(tmp_path / "none")}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert {name: part["state"] for name, part in found.items()} == dict.fromkeys(found, "done")
    assert found["lora"]["trained_tokens_per_second"] > 0 < found["trl-nf4"]["lorakit_times_as_fast"]
    assert found["merge"]["nf4"]["proof"]["mean_kl"] < 1e-6
