"""Promises of the scripts in docs/lifecycle.md: a good retraining is promoted, one on wrong labels is refused and
changes nothing, and what was before comes back."""

import os
import subprocess
import sys

import pytest
import yaml
from conftest import rows_of, write_rows
from eval_runs import make_run
from test_docs import ROOT, blocks, page


def script(name: str) -> str:
    (text,) = [block for block in blocks(page("docs/lifecycle.md"), "bash") if block.startswith(f"# {name}")]
    return text


def wrong(rows: list[dict]) -> list[dict]:
    """Rows whose answers are to other questions."""
    return [{"messages": [row["messages"][0], {"role": "assistant", "content": "Ask again later."}]} for row in rows]


@pytest.fixture
def shell(tmp_path, tiny_base, monkeypatch):
    """A folder with a run in production, rows, and the scripts; runs one of them."""
    run = make_run(tmp_path, tiny_base, train={"steps": ..., "epochs": 2, "learning_rate": 0.02})
    (tmp_path / "runs").mkdir()
    run.folder.rename(tmp_path / "runs" / "first")
    (tmp_path / "runs" / "production").symlink_to("first")
    write_rows(tmp_path / "good.jsonl", rows_of(120)[40:])
    write_rows(tmp_path / "bad.jsonl", wrong(rows_of(220)[120:]))
    write_rows(tmp_path / "trusted.jsonl", rows_of(260)[230:])
    for name in ("promote.sh", "rollback.sh"):
        (tmp_path / name).write_text(script(name).replace("json-valid=80%", "loss=9"))
    program = tmp_path / "bin" / "lorakit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lorakit "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}

    def call(*words):
        done = subprocess.run(["sh", *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return call


@pytest.mark.slow
def test_a_good_retraining_is_promoted_a_bad_one_is_refused_and_the_one_before_comes_back(shell, tmp_path):
    runs = tmp_path / "runs"
    code, said = shell("promote.sh", "good.jsonl", "trusted.jsonl")
    assert code == 0, said
    second = (runs / "production").readlink()
    assert second.name != "first" and (runs / "previous").readlink().name == "first" and "passes" in said
    code, said = shell("promote.sh", "bad.jsonl", "trusted.jsonl")
    assert code == 1 and "--not-worse-than: " in said and "loss is worse than that of" in said, said
    assert (runs / "production").readlink() == second and (runs / "previous").readlink().name == "first"
    assert len(list(runs.glob("*/adapter"))) == 2 + 3, "links and runs"
    assert shell("rollback.sh")[0] == 0
    assert (runs / "production").readlink().name == "first" and (runs / "production" / "adapter").is_dir()


def test_the_workflow_runs_the_scripts():
    (text,) = blocks(page("docs/lifecycle.md"), "yaml")
    steps = yaml.safe_load(text)["jobs"]["promote"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    for name in ("promote.sh", "rollback.sh"):
        assert any(f"ci/{name}" in command for command in commands) and script(name)
