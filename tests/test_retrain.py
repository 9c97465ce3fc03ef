"""Promises of `lorakit retrain`: the old recipe on old and new rows, what was held out stays held out, the old run
stays as it was, and the two are compared on the held-out rows of each."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import rows_of, write_rows
from eval_runs import labelled_rows, make_run
from launched_commands import end_of, running
from runs_of_tests import adapter_weights
from test_training import interrupted_after, same

from lorakit.prepare import prepare_run, reopen_run
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.run_dir import Run

NEW = rows_of(90)[50:]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_base):
    """A run with a file of held-out rows, and one that holds out a share."""
    root = tmp_path_factory.mktemp("retrain")
    make_run(root / "file", tiny_base)
    make_run(root / "share", tiny_base, data={"eval": 0.3})
    return root


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The two, as if they had been trained there, and new rows beside them."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for manifest in tmp_path.glob("*/run/manifest.json"):
        manifest.write_text(manifest.read_text().replace(str(made), str(tmp_path)))
    write_rows(tmp_path / "new.jsonl", NEW)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(examples, tokenizer) -> set[str]:
    return {tokenizer.decode(row["input_ids"]) for row in examples.rows}


def rows_of_run(run: Path) -> tuple[set[str], set[str]]:
    """What a run trains on, and what it holds out."""
    _, prepared = reopen_run(run, Silent())
    return texts(prepared.train, prepared.tokenizer), texts(prepared.held_out, prepared.tokenizer)


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def planned(command, *arguments) -> dict:
    """What `lorakit retrain --dry-run` would do."""
    code, out, err = command("retrain", *arguments, "--dry-run", "--json")
    assert code == 0, err
    return json.loads(out) | {"said": err}


@pytest.mark.parametrize("kind", ["file", "share"])
def test_old_and_new_rows_are_trained_and_the_two_compared_on_both_held_out_sets(folder, command, kind):
    before, (old_train, old_held_out) = files_of(folder / kind / "run"), rows_of_run(folder / kind / "run")
    code, out, err = command("retrain", f"{kind}/run", "--data", "new.jsonl", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["run"] == f"{kind}/run-2" and f"retraining {kind}/run on the old and the new rows" in err
    train, held_out = rows_of_run(folder / kind / "run-2")
    assert not train & held_out and held_out > old_held_out and train > old_train
    assert len(train | held_out) == len(old_train | old_held_out) + len(NEW)
    old, new = facts["compared"]
    assert old["part"] == "the held-out rows of run" and old["rows"] == len(old_held_out)
    assert new["part"] == "the new held-out rows" and new["rows"] == len(held_out) - len(old_held_out) > 0
    assert old["scores"]["loss"]["verdict"] in ("better", "worse", "cannot tell")
    assert json.loads(Path(facts["file"]).read_text())["gates"] == facts["compared"]
    assert files_of(folder / kind / "run") == before, "the old run has changed"
    repeated = command("train", f"{kind}/run-2/recipe.yaml", "--output", "again", "-q")
    assert repeated[0] == 0
    assert same(adapter_weights(Run(folder / "again")), adapter_weights(Run(folder / kind / "run-2")))


def test_it_goes_on_from_the_adapter_and_again_from_the_base_of_the_first(folder, command):
    code, out, err = command("retrain", "file/run", "--data", "new.jsonl", "--from", "adapter", "-o", "second", "-q")
    assert code == 0 and "the new held-out rows: second against run" in out, err
    manifest, first = Run(folder / "second").read_manifest(), Run(folder / "file" / "run").read_manifest()
    assert manifest["adapter_from"]["sha256"]["adapter_model.safetensors"] == first["adapter_sha256"]
    assert load(folder / "second" / "recipe.yaml").recipe.adapter.rank == 16  # the adapter's own counts
    write_rows(folder / "more.jsonl", rows_of(140)[100:])
    again = planned(command, "second", "--data", "more.jsonl")["recipe"]
    assert again["adapter"]["rank"] == 4 and again["adapter"]["from"] is None
    assert again["data"]["train"] == ["../file/train.jsonl", "../new.jsonl", "../more.jsonl"]
    assert [one if isinstance(one, str) else (one["path"], one["take"]) for one in again["data"]["eval"]] == [
        "../file/eval.jsonl",
        ("../new.jsonl", 0.2),
        ("../more.jsonl", 0.2),
    ]


def test_an_adapter_of_another_program_is_begun_with_again(folder, command):
    shutil.copytree(folder / "file" / "run" / "adapter", folder / "bought" / "deep")
    (folder / "recipe.yaml").write_text("adapter: {rank: 2}\n")
    assert command("train", "file/tiny.yaml", "--set", "adapter.from=bought/deep", "-o", "own", "-q")[0] == 0
    adapter = planned(command, "own", "--data", "new.jsonl")["recipe"]["adapter"]
    assert adapter["from"] == "../bought/deep" and "rank" not in adapter


def test_new_rows_alone_leave_the_old_held_out_rows_where_they_are(folder, command):
    _, old_held_out = rows_of_run(folder / "share" / "run")
    more = ("--only-new", "--from", "adapter", "-o", "onward", "--json")
    code, out, err = command("retrain", "share/run", "--data", "new.jsonl", *more)
    assert code == 0, err
    train, held_out = rows_of_run(folder / "onward")
    assert held_out > old_held_out and len(train | held_out) == len(old_held_out) + len(NEW)
    assert [one["rows"] for one in json.loads(out)["compared"]] == [
        len(old_held_out),
        len(held_out) - len(old_held_out),
    ]
    (folder / "share" / "train.jsonl").unlink()
    code, _, err = command("retrain", "share/run", "--data", "new.jsonl", "-o", "other")
    assert code == 2 and "its training rows are not here" in err and "--only-new --from adapter." in err
    facts = planned(command, "share/run", "--data", "new.jsonl", *more[:3], "-o", "other")
    assert "its held-out rows are not here, so only new ones are scored" in facts["said"]
    assert not (folder / "other").exists()


def test_no_row_that_was_held_out_is_trained_on(folder, command):
    """New rows among which are held-out and training rows of the old run."""
    old_eval = [json.loads(line) for line in (folder / "file" / "eval.jsonl").read_text().splitlines()]
    write_rows(folder / "mixed.jsonl", [*old_eval[:4], *rows_of(22)[:5], *NEW])
    facts = planned(command, "file/run", "--data", "mixed.jsonl")
    assert "new rows: 49 in mixed.jsonl, of which 5 are among the old ones and count twice" in facts["said"]
    assert "left out by data.clean.leakage: the same as a held-out row" in facts["said"]
    recipe = load(folder / "file" / "run-2" / "recipe.yaml", text=json.dumps(facts["recipe"])).recipe
    prepared = prepare_run(recipe, Silent())
    train, held_out = texts(prepared.train, prepared.tokenizer), texts(prepared.held_out, prepared.tokenizer)
    assert not train & held_out and rows_of_run(folder / "file" / "run")[1] < held_out
    share = ("share/run", "--data", "mixed.jsonl", "--set", "data.eval=0.05")
    code, _, err = command("retrain", *share)
    assert code == 2 and "rows that this run held out would be trained on (share/train.jsonl:" in err


def test_a_retraining_that_was_interrupted_goes_on_to_the_same_adapter(folder, command, monkeypatch):
    steps = ("--set", "train.save_every=1")
    assert command("retrain", "file/run", "--data", "new.jsonl", *steps, "-o", "whole", "-q")[0] == 0
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        code, _, err = command("retrain", "file/run", "--data", "new.jsonl", *steps, "-q")
    assert code and "stopped after step 2" in err
    shutil.copytree(folder / "file" / "run-2", folder / "file" / "run-3")
    code, out, err = command("retrain", "file/run", "--data", "new.jsonl", *steps, "--resume", "-o", "file/run-2")
    assert code == 0 and "the new held-out rows: run-2 against run" in out and "resuming after step-000002" in err
    own = ("--set", "output.dir=file/run-3")
    assert command("train", "file/run-3/recipe.yaml", *own, "--resume", "-q")[0] == 0
    whole = adapter_weights(Run(folder / "whole"))
    assert same(adapter_weights(Run(folder / "file" / "run-2")), whole)
    assert same(adapter_weights(Run(folder / "file" / "run-3")), whole)
    code, out, err = command("retrain", "file/run", "--data", "new.jsonl", *steps, "--resume", "-o", "whole", "--json")
    assert code == 0 and "the training has ended; the two are compared" in err and json.loads(out)["compared"]
    code, out, err = command("retrain", "file/run", "--data", "new.jsonl", "--resume", "-o", "whole")
    assert code == 2 and "whole: this run was started with another recipe:\n  - train.save_every: 1 then" in err


def test_a_run_that_moved_finds_its_base_and_its_rows_by_content(made, tiny_base, tmp_path, command, monkeypatch):
    home = tmp_path / "elsewhere"
    shutil.copytree(made / "file" / "run", home / "there" / "deep" / "run")
    base = shutil.copytree(tiny_base, home / "base")
    write_rows(home / "new.jsonl", NEW)
    (home / "production").symlink_to("there/deep/run")
    monkeypatch.chdir(home)
    facts = planned(command, "production", "--data", "new.jsonl", "--base", "base", "--from", "adapter")
    assert facts["recipe"]["model"]["base"] == "../../../base" and facts["recipe"]["adapter"]["from"] == "../run"
    assert facts["recipe"]["output"]["dir"] == "there/deep/run-2"
    assert facts["train"]["kept"] == 22 + len(NEW) - facts["eval"]["kept"] + 10
    (base / "model.safetensors").write_bytes(b"")
    code, _, err = command("retrain", "production", "--data", "new.jsonl", "--base", "base")
    assert code == 2 and "--base" in err


SHAPES = {
    "classification": (
        {"train": "labelled.jsonl", "format": {"classification": {"prompt": "What is {text}?"}}, "eval": 0.2},
        labelled_rows(60),
    ),
    "template": (
        {
            "train": "labelled.jsonl",
            "format": {"template": {"user": "Name {text}.", "assistant": "{label}"}},
            "eval": 0.2,
        },
        labelled_rows(60),
    ),
    "several sources": (
        {
            "train": [
                {"path": "train.jsonl", "weight": 2.0, "system": "Be brief."},
                {"path": "labelled.jsonl", "format": "classification", "take": 10, "system": "Be brief."},
            ],
        },
        rows_of(60),
    ),
    "no held-out rows": ({"eval": ...}, rows_of(60)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_are_trained_again(tmp_path, tiny_base, command, monkeypatch, shape):
    monkeypatch.chdir(tmp_path)
    data, new = SHAPES[shape]
    write_rows(tmp_path / "labelled.jsonl", labelled_rows(40))
    train = {"steps": 1, "eval_every": 1, "save_every": 1}
    make_run(tmp_path, tiny_base, data=data, train=train, evaluate={"metrics": []})
    write_rows(tmp_path / "new.jsonl", [*new[40:], *new[45:48]])
    facts = planned(command, "run", "--data", "new.jsonl", *([] if data.get("eval") == 0.2 else ["--held-out", "0.2"]))
    written = facts["recipe"]["data"]
    assert facts["train"]["kept"] and facts["eval"]["kept"]
    if shape == "several sources":
        assert written["train"][-1]["system"] == "Be brief." and written["train"][0]["weight"] == 2.0
    if shape == "no held-out rows":
        assert written["eval"][0]["take"] == 0.2 and written["clean"]["leakage"] == "fix"


def test_new_rows_of_another_shape_are_read_as_it_is_said(folder, command):
    (folder / "new.csv").write_text("ask,reply\n" + "".join(f"What is {at}?,It is {at}.\n" for at in range(50)))
    code, _, err = command("retrain", "file/run", "--data", "new.csv", "--dry-run")
    assert code == 2 and "new.csv" in err
    shape = ("--format", "question-answer", "--columns", "question=ask,answer=reply")
    facts = planned(command, "file/run", "--data", "new.csv", *shape)
    assert facts["train"]["kept"] + facts["eval"]["kept"] == 22 + 10 + 50
    code, out, _ = command("retrain", "file/run", "--data", "new.csv", *shape, "--dry-run")
    assert code == 0 and "run-2/recipe.yaml\nname: run-2" in out and not (folder / "file" / "run-2").exists()


def test_rows_that_are_held_out_of_a_file_are_packed_without_its_training_rows(folder, command):
    assert command("retrain", "file/run", "--data", "new.jsonl", "-q")[0] == 0
    _, held_out = rows_of_run(folder / "file" / "run-2")
    assert command("pack", "file/run-2", "--held-out-rows", "-o", "run.tar")[0] == 0
    shutil.move(folder / "file", folder / "gone")
    (folder / "new.jsonl").unlink()
    assert command("unpack", "run.tar", "-o", "handed/over")[0] == 0
    rows = [line for file in Path("handed/over/rows").rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(rows) == len(held_out)
    _, prepared = reopen_run(Path("handed/over"), Silent())
    assert texts(prepared.held_out, prepared.tokenizer) == held_out


def test_a_full_fine_tuning_is_trained_again_from_its_base_or_from_what_it_became(tmp_path, tiny_base, command):
    whole = {"kind": "none", "rank": ..., "alpha": ...}
    run = make_run(tmp_path, tiny_base, adapter=whole, train={"steps": 1}, model={"add_tokens": ["<thing>"]})
    rows = write_rows(tmp_path / "new.jsonl", NEW)
    model = planned(command, run.folder, "--data", rows)["recipe"]["model"]
    assert model["base"].endswith(tiny_base.name) and model["add_tokens"] == ["<thing>"]
    facts = planned(command, run.folder, "--data", rows, "--from", "adapter")
    assert facts["recipe"]["model"]["base"] == "../run/model" and facts["recipe"]["adapter"]["kind"] == "none"
    assert facts["recipe"]["model"]["add_tokens"] == []


def test_a_new_run_that_is_worse_fails_where_that_is_asked_for(folder, command):
    worse = ("--set", "train.learning_rate=1.0", "--fail-if-worse")
    code, out, err = command("retrain", "file/run", "--data", "new.jsonl", *worse, "-q")
    assert code == 1 and "the held-out rows of run: run-2 against run (10 rows)" in out
    assert "--fail-if-worse: run-2: loss is worse than that of run: +" in err
    assert "on 10 rows, the held-out rows of run" in err
    assert (folder / "file" / "run-2" / "adapter").is_dir()


@pytest.mark.slow
def test_two_devices_train_again_and_compare_as_one(folder):
    words = ["retrain", "file/run", "--data", "new.jsonl", "--devices", "2", "--json", "--quiet"]
    with running(sys.executable, "-m", "lorakit", *words) as process:
        code, out, err = end_of(process)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["devices"] == 2 and [one["rows"] for one in facts["compared"]] == [10, 3]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere", "--data", "new.jsonl"], "nowhere: there is no such run"),
        (["file/run", "--data", "gone.jsonl"], "--data: gone.jsonl: there is no such file"),
        (["file/run", "--data", "file/train.jsonl"], "file/train.jsonl is among the rows of the run already"),
        (["file/run", "--data", "new.jsonl", "-o", "file/run"], "is the run that is trained again. It stays as it is"),
        (["file/run", "--data", "new.jsonl", "-o", "share/run"], "holds another run's results"),
        (["file/run", "--data", "new.jsonl", "--resume", "-o", "x"], "x holds no run that began. Leave --resume out"),
        (["file/run", "--data", "new.jsonl", "--resume"], "there is no run-2 beside file/run"),
        (["share/run", "--data", "new.jsonl", "--held-out", "0.5"], "holds out a share of all rows (data.eval: 0.3)"),
        (["file/run", "--data", "new.jsonl", "--set", "output.dir=x"], "Write --output DIR"),
        (["file/run", "--data", "new.jsonl", "--set", "train.epoch=2"], "--set train.epoch=2"),
    ],
)
def test_what_cannot_be_trained_again_is_one_clear_line_and_nothing_is_written(folder, command, arguments, reason):
    before = sorted(folder.rglob("*"))
    code, out, err = command("retrain", *arguments, "-q")
    assert code == 2 and reason in err and out == "", err
    assert sorted(folder.rglob("*")) == before
