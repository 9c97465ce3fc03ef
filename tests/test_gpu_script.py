"""tools/gpu.sh: what it found is kept whatever happens to the rest."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu(monkeypatch):
    """The script's module."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import gpu

    return gpu


def bench_of(gpu, folder, seconds=60.0):
    return gpu.Bench(folder, True, time.monotonic() + seconds, summary=gpu.summary)


def test_a_part_that_fails_is_recorded_and_the_next_one_begins(gpu, tmp_path):
    def fails(bench):
        raise SystemExit("out of memory")

    bench = bench_of(gpu, tmp_path)
    gpu.run_part(bench, "1b lora long", fails)
    assert json.loads((tmp_path / "results.json").read_text())["1b lora long"]["error"] == "out of memory"
    gpu.run_part(bench, "merge", lambda bench: {"figure": 1})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["merge"]["state"] == "done" and found["merge"]["figure"] == 1
    assert "## 1b lora long failed" in (tmp_path / "summary.md").read_text()


def test_no_part_begins_when_the_time_is_up(gpu, tmp_path):
    bench = bench_of(gpu, tmp_path, 5)
    gpu.run_part(bench, "merge", lambda bench: pytest.fail("began"))
    assert bench.results["merge"]["state"] == "no time left"


def test_a_part_has_its_own_limit(gpu, tmp_path):
    bench = bench_of(gpu, tmp_path, 1000)
    gpu.run_part(bench, "merge", lambda bench: {"left": bench.left()}, 20)
    assert bench.results["merge"]["left"] <= 20
    gpu.run_part(bench, "doctor", lambda bench: {"left": bench.left()}, 500)
    assert 20 < bench.results["doctor"]["left"] <= 500


def test_what_cannot_be_compared_here_is_skipped_with_its_reason(gpu, tmp_path):
    bench = bench_of(gpu, tmp_path)
    for name in ("trl 1b lora long", "unsloth 8b nf4 long", "8b nf4 long", "merge"):
        gpu.run_part(bench, name, gpu.PARTS[name][1])
    assert {found["state"] for found in bench.results.values()} == {"skipped"}
    assert "8b nf4 long was skipped: the 8b model was not made" in (tmp_path / "summary.md").read_text()


def test_the_model_of_random_weights_loads_without_a_warning(gpu, tmp_path):
    from transformers import AutoModelForCausalLM

    for shape in ("1b", "8b"):
        found = gpu.model(bench_of(gpu, tmp_path), shape)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / shape, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.num_parameters() == found["parameters"]
    assert len((tmp_path / "work/long.jsonl").read_text().splitlines()) == bench_of(gpu, tmp_path).steps * gpu.BATCH


def test_a_wheel_keeps_the_kernels_of_the_named_versions_of_cuda(gpu, tmp_path):
    from gpu_wheels import keep_cuda

    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    names = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda126", "cuda128", "rocm70")]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in (*names, "bitsandbytes/__init__.py"):
            file.writestr(name, "x")
        file.writestr("bitsandbytes-1.dist-info/RECORD", "".join(f"{name},sha256=x,1\n" for name in names))
    keep_cuda(wheel, ("12.8",))
    with zipfile.ZipFile(wheel) as file:
        assert [name for name in file.namelist() if name.endswith(".so")] == [names[0], names[2]]
        assert file.read("bitsandbytes-1.dist-info/RECORD").decode().count("\n") == 2
        assert "bitsandbytes/__init__.py" in file.namelist()


@pytest.mark.slow
def test_the_rehearsal_measures_every_part_without_a_gpu(tmp_path):
    command = [str(ROOT / "tools/gpu.sh"), "--rehearse", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHON": sys.executable, "LORAKIT_SITE": str(tmp_path / "none")}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found = json.loads((tmp_path / "out/results.json").read_text())
    states = {name: part["state"] for name, part in found.items()}
    assert "failed" not in states.values() and "no time left" not in states.values()
    others = [name for name in states if name.startswith(("liger", "unsloth")) or "=" in name]
    assert all(state == "done" or name in others for name, state in states.items())
    assert found["1b lora long"]["tokens_per_second"] > 0 < found["trl 1b nf4 long"]["lorakit_times_as_fast"]
    losses = found["1b lora long"]["losses"], found["trl 1b lora long"]["losses"]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)  # the same rows in the same order; trl rounds what it logs
    assert found["merge"]["1b nf4 long"]["proof"]["mean_kl"] < 1e-6
