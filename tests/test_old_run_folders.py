"""Runs that an earlier version left evaluate, merge and resume, wherever they lie now."""

import json
import shutil
from pathlib import Path

import pytest

FOLDERS = Path(__file__).parent / "run_folders_of_0_1_0"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    shutil.copytree(FOLDERS, tmp_path / "support")
    monkeypatch.chdir(tmp_path / "support")
    return tmp_path / "support"


def test_an_old_run_scores_what_it_scored(folders, command):
    [before] = [json.loads(path.read_text()) for path in (folders / "finished/eval").glob("*.json")]
    code, out, err = command("eval", "finished", "--json")
    assert code == 0, err
    after = json.loads(out)
    assert after["models"].keys() == before["models"].keys() == {"base", "adapter"}
    for name, model in after["models"].items():
        assert model["identity"] == before["models"][name]["identity"]
        assert model["scores"].keys() == before["models"][name]["scores"].keys()
        for score, value in model["scores"].items():
            assert value["value"] == pytest.approx(before["models"][name]["scores"][score]["value"], rel=1e-4)


def test_an_old_run_merges_with_proof(folders, command):
    code, _, err = command("merge", "finished")
    assert code == 0, err
    assert json.loads((folders / "finished/merged/merge.json").read_text())["proof"]["top1_agreement"] == 1


def test_an_old_interrupted_run_resumes_to_the_result_of_the_finished_one(folders, command):
    code, _, err = command("train", "recipe.yaml", "--output", "interrupted", "--resume")
    assert code == 0, err
    assert "step-000006" in err
    resumed, finished = (
        json.loads((folders / name / "manifest.json").read_text()) for name in ("interrupted", "finished")
    )
    assert resumed["result"]["eval_loss"] == pytest.approx(finished["result"]["eval_loss"], rel=1e-4)
    assert resumed["data"]["tokens_sha256"] == finished["data"]["tokens_sha256"]
    assert resumed.keys() == finished.keys() | {"block_code", "recipe"}  # what runs of today say besides


def test_an_old_recipe_of_a_run_passes_check(folders, command):
    code, _, err = command("check", "finished/recipe.yaml")
    assert code == 0, err
