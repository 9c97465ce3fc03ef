"""Promises of `lorakit export RUN --ladder`: rungs made once, scored on the same rows, and what follows from it."""

import json
from pathlib import Path

import pytest
from eval_runs import edit_json, make_run
from gguf_models import spm_base

from lorakit.errors import LorakitError
from lorakit.evaluate.gguf_speed import measure_speed
from lorakit.evaluate.ladder import share_of_quality
from lorakit.evaluate.metric import Comparison, mean, perplexity
from lorakit.evaluate.metric import loss as loss_measure


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    return make_run(folder, spm_base(folder / "base"))


@pytest.fixture(scope="module")
def ladder(run, tmp_path_factory):
    """The ladder of the run as JSON, made by the command itself."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "lorakit", "export", str(run.folder), "--ladder", "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["ladder"]


@pytest.mark.slow
def test_a_ladder_has_sizes_speeds_verdicts_and_shares(run, ladder):
    rungs = ladder["rungs"]
    assert [rung["name"] for rung in rungs] == ["F32", "Q8_0", "Q4_K_M", "Q2_K"]
    sizes = [rung["bytes"] for rung in rungs]
    assert sizes == sorted(sizes, reverse=True) and sizes == [Path(rung["path"]).stat().st_size for rung in rungs]
    assert all(min(rung["tokens_in"], rung["tokens_out"], rung["memory"]) > 0 for rung in rungs)
    # The model is in the memory of its process, and the process itself is not counted.
    assert all(rung["bytes"] < rung["memory"] < rung["bytes"] + (64 << 20) for rung in rungs)
    assert "verdicts" not in rungs[0] and all("loss" in rung["verdicts"] for rung in rungs[1:])
    assert rungs[1]["quality"]["loss"] == pytest.approx(1, abs=0.01)
    assert all(rung["fallback_share"] == 0 for rung in rungs)
    assert ladder["unmerged"]["tokens_out"] > 0 and ladder["unmerged"]["bytes"] > sizes[0]


@pytest.mark.slow
def test_a_ladder_is_stored_as_an_evaluation_and_says_the_smallest_rung_alike(run, ladder):
    stored = json.loads(Path(ladder["evaluation"]).read_text())
    assert Path(ladder["evaluation"]).parent == run.evaluations and stored["baseline"] == "F32"
    assert stored["ladder"] == {key: value for key, value in ladder.items() if key != "evaluation"}
    verdicts = {rung["name"]: set(rung["verdicts"].values()) for rung in ladder["rungs"][1:]}
    alike = [name for name, of_rung in verdicts.items() if of_rung == {"cannot tell"}]
    assert ladder["smallest_alike"] == (alike[-1] if alike else None)
    assert (alike[-1] if alike else "Every rung can be told") in ladder["conclusion"]


@pytest.mark.slow
def test_rungs_that_are_there_stay_and_others_join_them(run, ladder, command):
    before = {rung["path"]: Path(rung["path"]).stat().st_mtime_ns for rung in ladder["rungs"]}
    code, out, err = command("export", run.folder, "--ladder", "--to", "gguf:q6_k", "--rows", 3)
    assert code == 0, err
    assert "Q6_K" in out and "tokens/s out" in out and "too few (3)" in out
    assert "base + adapter" in out and "Merged, the model reads" in out
    assert not [path for path in run.exports.iterdir() if "draft" in path.name]
    assert before == {path: Path(path).stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_a_rung_of_another_adapter_is_not_taken_for_this_ones(run, ladder, lorakit):
    document = run.exports / "gguf-q8_0" / "export.json"
    facts = json.loads(document.read_text())
    edit_json(document, adapter_sha256="0" * 64)
    code, _, err = lorakit("export", run.folder, "--ladder")
    assert code == 2 and "another adapter was exported" in err
    document.write_text(json.dumps(facts))


@pytest.mark.slow
def test_a_ladder_needs_a_run_and_rows_a_ladder(run, ladder, lorakit):
    code, _, err = lorakit("export", run.merged, "--ladder")
    assert code == 2 and "is not a run" in err
    code, _, err = lorakit("export", run.folder, "--to", "gguf:q8_0", "--rows", 5)
    assert code == 2 and "--rows: is for --ladder" in err


def test_the_share_of_quality_is_one_thing_for_each_kind_of_score():
    import numpy as np

    def compared(first, second):
        return Comparison(first, second, second - first, None, "cannot tell", 9, None)

    ones = np.ones(9)
    assert share_of_quality(compared(1.0, 1.1), loss_measure(ones, ones)) == pytest.approx(np.exp(-0.1))
    assert share_of_quality(compared(0.8, 0.6), mean(ones)) == pytest.approx(0.75)
    assert share_of_quality(compared(2.0, 4.0), perplexity(ones, ones)) == pytest.approx(0.5)
    assert share_of_quality(compared(0.0, 0.1), mean(ones)) is None
    assert share_of_quality(compared(1.0, 0.9), mean(ones, "ratio", None)) is None


def test_a_file_that_the_server_cannot_run_is_named(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(LorakitError, match=r"broken\.gguf: llama\.cpp's server ended"):
        measure_speed(tmp_path / "broken.gguf", [1, 2, 3], 1)
