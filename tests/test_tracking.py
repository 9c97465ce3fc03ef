"""Trackers get what log.jsonl has, in one tracked run however often it is resumed, and cost a run nothing but time."""

import inspect
import json
import os
import re
import signal
import socket
import sqlite3
import struct
import sys
from importlib.util import find_spec

import pytest
import yaml
from conftest import rows_of, write_rows
from runs_of_tests import run_recipe
from test_training import interrupted_after

from lorakit.errors import Interrupted
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.registry import TRACKERS
from lorakit.run_dir import Run, open_run
from lorakit.track import tracking
from lorakit.track.trackers import samples_as_markdown, without_credentials
from lorakit.track.tracking import Tracking, track, track_scores, tracked_ids

SECRET = "0123456789abcdef0123456789abcdef01234567"
SETTINGS = {
    "tensorboard": "tensorboard",
    "wandb": {"wandb": {"project": "tests", "mode": "offline", "tags": ["tiny"]}},
    "mlflow": {"mlflow": {"experiment": "tests", "name": "a tiny run", "tags": {"kind": "test"}}},
    "trackio": {"trackio": {"project": "tests"}},
}
MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
OF_TRACKERS = ("TENSORBOARD_", "WANDB_", "MLFLOW_", "TRACKIO_")


class Listener(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.facts: list[str] = []
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        self.facts.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(autouse=True)
def no_tracker_of_the_users(monkeypatch):
    for name in [name for name in os.environ if name.startswith(OF_TRACKERS)]:
        monkeypatch.delenv(name)


def track_resumed_run(folder, base, names):
    """A run with the trackers whose packages are installed, stopped after step 5, resumed, and scored twice; by what
    they know it before that."""
    recipe = {
        "model": {"base": str(base)},
        "adapter": {"rank": 4},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 128},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 0.05, "eval_every": 4, "save_every": 2},
        "evaluate": {"samples": 2, "max_new_tokens": 8},
        "track": [SETTINGS[name] for name in names if find_spec(MODULES[name])],
    }
    if not recipe["track"]:
        pytest.skip("no tracker is installed")
    write_rows(folder / "train.jsonl", rows_of(22))
    write_rows(folder / "eval.jsonl", rows_of(40)[30:])
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "empty")
        patch.setenv("WANDB_API_KEY", SECRET)
        with pytest.MonkeyPatch.context() as stop:
            interrupted_after(5, stop)
            with pytest.raises(Interrupted):
                run_recipe(path, folder / "run")
        ids, progress = tracked_ids(Run(folder / "run")), Listener()
        run, outcome = run_recipe(path, folder / "run", resume=True, progress=progress)
        for score in (0.25, 0.5):
            track_scores(run, load(run.recipe).recipe.track, {"adapter": {"json-valid": score, "f1 é": 1.0}}, progress)
    return run, outcome, ids, progress


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, tiny_base):
    return track_resumed_run(tmp_path_factory.mktemp("tracked"), tiny_base, ("tensorboard", "trackio"))


@pytest.fixture(scope="module")
def tracked_slowly(tmp_path_factory, tiny_base):
    """By libraries that take many seconds to start."""
    return track_resumed_run(tmp_path_factory.mktemp("slowly"), tiny_base, ("mlflow", "wandb"))


def logged(run, key):
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


@pytest.mark.parametrize("name", ["tracked", pytest.param("tracked_slowly", marks=pytest.mark.slow)])
def test_a_resumed_run_is_one_run_to_its_trackers_and_stays_in_its_folder(request, name):
    run, _, ids, progress = request.getfixturevalue(name)
    assert tracked_ids(run) == ids and progress.warnings == []
    assert {fact.partition(":")[0] for fact in progress.facts} >= ids.keys()
    assert not list((run.folder.parent / "empty").iterdir())  # where it was started
    assert not [path for path in run.folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_event_files_of_tensorboard_equal_the_log(tracked):
    pytest.importorskip("tensorboardX")
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, outcome, _, _ = tracked
    events = accumulators.EventAccumulator(str(run.tracking / "tensorboard"))
    events.Reload()
    names = {"train/loss": "loss", "train/learning_rate": "learning_rate", "train/grad_norm": "grad_norm"}
    names |= {"eval/loss": "eval_loss", "train/epoch": "epoch"}
    for tag, key in names.items():
        written = {event.step: event.value for event in events.Scalars(tag)}
        assert written == pytest.approx(dict(logged(run, key)), rel=1e-6), tag  # it has 32 bits
    (loss,) = (event.value for event in events.Scalars("eval/best_loss"))
    assert loss == pytest.approx(outcome.eval_loss)
    texts = {one.step: one.tensor_proto.string_val[0].decode() for one in events.Tensors("eval/samples/text_summary")}
    rows = run.read_sampled_rows()
    whole = {step: [row | one for row, one in zip(rows, of, strict=True)] for step, of in logged(run, "samples")}
    assert texts == {step: samples_as_markdown(samples) for step, samples in whole.items()}
    assert "    <|im_start|>user\n" in texts[4] and set(texts) == {4, 8, 12}
    assert [(one.step, one.value) for one in events.Scalars("eval/scores/adapter/json-valid")][-1] == (12, 0.5)


@pytest.mark.slow
def test_runs_of_mlflow_equal_the_log(tracked_slowly):
    library = pytest.importorskip("mlflow")
    run, outcome, ids, _ = tracked_slowly
    client = library.MlflowClient(f"sqlite:///{run.tracking / 'mlflow' / 'mlflow.db'}")
    stored = client.get_run(ids["mlflow"])
    for key in ("loss", "eval_loss", "learning_rate", "grad_norm", "trained_tokens_per_second"):
        points = [(point.step, point.value) for point in client.get_metric_history(ids["mlflow"], key)]
        expected = logged(run, key)
        if key == "trained_tokens_per_second":
            expected.append((outcome.steps, outcome.trained_tokens_per_second))
        assert sorted(points) == sorted(expected), key
    assert (stored.info.status, stored.info.run_name, stored.data.tags["kind"]) == ("FINISHED", "a tiny run", "test")
    assert stored.data.metrics["eval_best_loss"] == outcome.eval_loss
    scores = client.get_metric_history(ids["mlflow"], "eval_scores/adapter/json-valid")
    assert [(point.step, point.value) for point in scores] == [(12, 0.25), (12, 0.5)]
    assert stored.data.metrics["eval_scores/adapter/f1 _"] == 1.0
    files = sorted(path.name for path in run.tracking.glob("mlflow/artifacts/*/artifacts/samples/*"))
    assert files == ["step-000004.md", "step-000008.md", "step-000012.md"]
    assert stored.data.params["train.learning_rate"] == "0.05"
    assert int(stored.data.params["run.parameters.trainable"]) == run.read_manifest()["parameters"]["trainable"]
    assert client.get_experiment_by_name("tests").experiment_id == stored.info.experiment_id


def test_runs_of_trackio_equal_the_log(tracked):
    pytest.importorskip("trackio")
    run, outcome, ids, _ = tracked
    with sqlite3.connect(run.tracking / "trackio" / "tests.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
        ((config,),) = database.execute("select distinct config from configs").fetchall()
    assert {name for name, _ in rows} == {ids["trackio"]}
    lines = [json.loads(metrics) for _, metrics in rows]
    for name, key in {"train/loss": "loss", "eval/loss": "eval_loss", "train/learning_rate": "learning_rate"}.items():
        assert [(line["train/global_step"], line[name]) for line in lines if name in line] == logged(run, key)
    assert [line["eval/best_loss"] for line in lines if "eval/best_loss" in line] == [outcome.eval_loss]
    assert lines[0]["train/peak_memory"] > 0
    answers = [
        (line["train/global_step"], [row["answer"] for row in line["eval/samples"]["_value"]])
        for line in lines
        if "eval/samples" in line
    ]
    assert answers == [(step, [sample["answer"] for sample in samples]) for step, samples in logged(run, "samples")]
    assert lines[-1]["eval/scores/adapter/json-valid"] == 0.5 and lines[-1]["train/global_step"] == 12
    assert json.loads(config)["adapter"]["rank"] == 4


@pytest.mark.slow
def test_runs_of_wandb_equal_the_log_offline(tracked_slowly):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    run, outcome, ids, _ = tracked_slowly
    history, config = [], {}
    for file in sorted((run.tracking / "wandb").glob(f"offline-run-*-{ids['wandb']}/*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            updates = [*record.run.config.update, *record.config.update]
            config |= {item.key: json.loads(item.value_json) for item in updates}
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            history += [{name: json.loads(value) for name, value in items.items()}] if items else []
    for name, key in {"train/loss": "loss", "eval/loss": "eval_loss", "train/learning_rate": "learning_rate"}.items():
        assert [(line["train/global_step"], line[name]) for line in history if name in line] == logged(run, key)
    assert [line["eval/best_loss"] for line in history if "eval/best_loss" in line] == [outcome.eval_loss]
    paths = {line["train/global_step"]: line["eval/samples/path"] for line in history if "eval/samples/path" in line}
    answers = {}
    for step, path in paths.items():
        (file,) = (run.tracking / "wandb").glob(f"*/files/{path}")
        answers[step] = [row[-1] for row in json.loads(file.read_text())["data"]]
    assert answers == {step: [one["answer"] for one in samples] for step, samples in logged(run, "samples")}
    assert history[-1]["eval/scores/adapter/json-valid"] == 0.5
    assert config["train"]["learning_rate"] == 0.05


def leveldb_records(data):
    """The records of a file of wandb: LevelDB's log format after a header of seven bytes."""
    record, place = b"", 7
    while place + 7 <= len(data):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Trackers that follow a run of one figure, with little patience; what is said of them."""
    monkeypatch.setattr(tracking, "PATIENCE", 1.0)
    monkeypatch.setattr(tracking, "_SILENCE", 0.1)

    def follow(trackers, meanwhile=lambda _: None):
        progress = Listener()
        with open_run(tmp_path / "run", resume=False, overwrite=False) as run, track(run, progress) as one:
            one.start(trackers, {}, 0)
            one.log({"step": 1, "loss": 0.5})
            meanwhile(one)
        return progress

    return follow


def test_a_tracker_that_fails_is_told_once(follow, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(tracking, "PATIENCE", 60.0)
    (warning,) = follow(["tensorboard"]).warnings
    assert "Not a directory" in warning and "log.jsonl has every figure" in warning


def test_a_server_that_does_not_answer_has_its_time(follow, monkeypatch):
    pytest.importorskip("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@127.0.0.1:{server.getsockname()[1]}")
        progress = follow(["mlflow"])
    assert progress.facts == ["waiting for mlflow to take the last figures"]
    (warning,) = progress.warnings
    assert "within 1 second" in warning and SECRET not in warning


def test_scores_go_to_the_trackers_that_know_the_run_and_none_changes_the_exit_code(
    recipe_file, tmp_path, lorakit, monkeypatch
):
    """TensorBoard followed it and gets them; Trackio never knew it. Of rows of another number none are sent."""
    pytest.importorskip("tensorboardX")
    path = recipe_file(train={"steps": 1, "epochs": ...})
    run, _ = run_recipe(path, tmp_path / "run", "track=[tensorboard]")
    run.recipe.write_text(re.sub(r"\n( *)- tensorboard\n", r"\n\1- tensorboard\n\1- trackio\n", run.recipe.read_text()))
    assert "- trackio" in run.recipe.read_text()
    events = run.tracking / "tensorboard"
    before = sum(file.stat().st_size for file in events.iterdir())
    code, _, err = lorakit("eval", run.folder, "--rows", "2", "--no-cache")
    assert code == 0 and "tensorboard" not in err and sum(one.stat().st_size for one in events.iterdir()) == before, err
    code, _, err = lorakit("eval", run.folder)
    assert code == 0 and f"tensorboard: {events}" in err and "trackio" not in err, err
    written = b"".join(file.read_bytes() for file in events.iterdir())
    for name in ("base/loss", "adapter/loss", "adapter/exact-match"):
        assert f"eval/scores/{name}".encode() in written
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(run.manifest / "below"))
    code, _, err = lorakit("eval", run.folder)
    assert code == 0 and err.count("note: tensorboard did not get the scores") == 1 and "eval/ has them" in err, err


def test_a_process_that_ends_is_told_once(follow):
    def kill(one: Tracking) -> None:
        os.killpg(one.process.pid, signal.SIGKILL)

    (warning,) = follow(["tensorboard"], kill).warnings
    assert "its process ended" in warning


def test_every_setting_of_a_tracker_reaches_its_library():
    for entry in TRACKERS:
        source = inspect.getsource(entry.function)
        assert all(f"settings.{name}" in source for name in (entry.settings.model_fields if entry.settings else ()))


def test_no_password_of_an_address_is_shown():
    assert without_credentials("cannot reach https://me:secret@host/x") == "cannot reach https://host/x"


def test_a_tracker_without_its_package_is_refused_before_training(recipe_file, tmp_path, lorakit, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    path = recipe_file()
    code, _, err = lorakit("train", path, "--set", "track=[wandb]", "--output", tmp_path / "run")
    assert code == 2 and 'pip install "lorakit[wandb]"' in err and not (tmp_path / "run").exists()
    assert lorakit("check", path, "--set", "track=[wandb]")[0] == 0  # which may be meant for another machine


@pytest.mark.parametrize(
    ("track", "words"),
    [
        ("[tensorboard, {wandb: {mode: offline}}, wandb]", "'wandb' is there twice"),
        ("[{wandb: {mode: online}, trackio: {}}]", "wandb and trackio are 2 trackers"),
        ("[{wandb: {api_key: x}}]", "track[0].wandb.api_key"),
        ("[tensorbord]", "Did you mean tensorboard?"),
        ("wandb", "track"),
    ],
)
def test_a_mistake_in_track_is_an_error_of_the_recipe(recipe_file, lorakit, track, words):
    code, _, err = lorakit("check", recipe_file(), "--set", f"track={track}")
    assert code == 2 and words in err


def test_overwriting_deletes_what_trackers_wrote_and_nothing_else(recipe_file, tmp_path, lorakit):
    path = recipe_file(train={"steps": 1, "epochs": None})
    run, _ = run_recipe(path, tmp_path / "run")
    (run.tracking / "wandb").mkdir(parents=True)
    run.tracked.write_text('{"wandb": null, "../eval": "x"}')
    for name in ("mine.txt", "wandb/offline", "notes/mine.txt"):
        (run.tracking / name).parent.mkdir(exist_ok=True)
        (run.tracking / name).write_text("x")
    assert lorakit("train", path, "--output", run.folder, "--overwrite", "--quiet")[0] == 0
    left = {path.relative_to(run.tracking).as_posix() for path in run.tracking.rglob("*")}
    assert left == {"mine.txt", "notes", "notes/mine.txt"}


BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
OF_AXOLOTL = {
    "base_model": BASE,
    "datasets": [{"path": "train.jsonl", "type": "chat_template"}],
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "learning_rate": 2e-4,
    "wandb_project": "support",
    "wandb_entity": "",
    "use_tensorboard": True,
}
OF_TRL = {
    "model_name_or_path": BASE,
    "dataset_name": "train.jsonl",
    "use_peft": True,
    "report_to": ["mlflow", "comet_ml"],
}


@pytest.mark.parametrize(
    ("config", "track"),
    [(OF_AXOLOTL, ["tensorboard", {"wandb": {"project": "support"}}]), (OF_TRL, ["mlflow"])],
    ids=["axolotl", "trl"],
)
def test_trackers_of_another_tools_config_are_imported(recipe_file, tmp_path, lorakit, config, track):
    recipe_file()
    (tmp_path / "theirs.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    code, out, err = lorakit("import", tmp_path / "theirs.yml", "--output", tmp_path / "ours.yaml")
    assert code == 0, out + err
    assert yaml.safe_load((tmp_path / "ours.yaml").read_text(encoding="utf-8"))["track"] == track
