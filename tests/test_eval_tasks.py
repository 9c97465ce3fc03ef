"""Promises of `lorakit benchmark`: lm-eval's tasks on runs and models, as tables, as JSON and as a file."""

import json
import shutil
from pathlib import Path

import pytest
from eval_runs import make_run
from peft_adapters import KINDS, save_peft_adapter
from test_tasks import CHOICE, TEXTS, harness, task_folder, without_lm_evals_own  # noqa: F401 (fixtures)

from lorakit.evaluate.benchmarks.run import FORMAT


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base):
    return make_run(tmp_path_factory.mktemp("tasks"), tiny_base)


def test_base_and_adapter_are_scored_on_tasks_in_one_load(run, lorakit_benchmark, task_folder, loads):  # noqa: F811
    folder = task_folder(choice=CHOICE, texts=TEXTS)
    code, out, err = lorakit_benchmark(run.folder, "--tasks", "choice, texts", "--tasks-path", folder)
    assert code == 0, err
    assert loads == ["none"]
    for words in ("benchmarks", "choice acc", "texts word_perplexity", "adapter against base", "95 % interval"):
        assert words in out, words
    file = Path(out.rsplit("all figures: ", 1)[1].strip())
    assert file.parent == run.evaluations and file.name.startswith("tasks-2")
    facts = json.loads(file.read_text())
    assert facts["format"] == FORMAT == 1 and facts["baseline"] == "base"
    assert facts["subjects"]["adapter"]["adapter"] == str(run.adapter)
    assert facts["subjects"]["base"]["identity"] != facts["subjects"]["adapter"]["identity"]


def test_json_is_the_document_of_the_file(run, lorakit_benchmark, task_folder, tmp_path):  # noqa: F811
    folder = task_folder(choice=CHOICE)
    options = ("--tasks", "choice", "--tasks-path", folder, "--limit", 6, "--chat-template", "--json", "--seed", 4)
    found = [json.loads(lorakit_benchmark(run.folder, *options, "-o", tmp_path / "out")[1]) for _ in range(2)]
    assert len({facts["file"] for facts in found}) == 2, "two of one second are one file"
    facts = found[0]
    kept = json.loads(Path(facts.pop("file")).read_text())
    assert kept == facts and facts["models"] == found[1]["models"]
    settings = facts["settings"]
    assert (settings["tasks"], settings["limit"], settings["chat"], settings["seed"]) == (["choice"], 6, True, 4)
    first = facts["models"]["base"][0]
    assert (first["task"], first["metric"], first["rows"]) == ("choice", "acc", 6)
    assert first["low"] <= first["value"] <= first["high"]
    compared = facts["comparisons"]["adapter"]["choice acc"]
    assert compared["difference"] == facts["models"]["adapter"][0]["value"] - first["value"]


def test_a_model_alone_and_quantized_bases(run, tiny_base, lorakit_benchmark, task_folder, loads):  # noqa: F811
    folder = task_folder(choice=CHOICE)
    options = ("--tasks", "choice", "--tasks-path", folder, "--limit", 4)
    code, out, _ = lorakit_benchmark(tiny_base, *options)
    assert code == 0 and "not stored" in out and "against" not in out
    loads.clear()
    code, out, _ = lorakit_benchmark(run.folder, *options, "--quantizations", "nf4", "--baseline", "adapter", "--json")
    facts = json.loads(out)
    assert code == 0 and loads == ["none", "nf4"]
    assert facts["comparisons"].keys() == {"base", "adapter on nf4"} and facts["baseline"] == "adapter"


@pytest.mark.slow
def test_tasks_are_scored_alike_in_any_order_and_alone(tmp_path, run, tiny_base, lorakit_benchmark, task_folder):  # noqa: F811
    head = make_run(tmp_path / "head", tiny_base, adapter={"rank": 4, "alpha": 8, "train_modules": ["lm_head"]})
    foreign = save_peft_adapter(tiny_base, tmp_path / "foreign", KINDS["olora"]())
    options = ("--tasks", "texts", "--tasks-path", task_folder(texts=TEXTS), "--json", "-o", tmp_path / "out")

    def values(*given):
        code, out, err = lorakit_benchmark(*given, *options)
        assert code == 0, err
        facts = json.loads(out)
        return {one["given"]: facts["models"][name][0]["value"] for name, one in facts["subjects"].items()}

    one = values(head.folder, foreign, run.folder)
    assert one == values(run.folder, foreign, head.folder)
    assert one[str(run.folder)] == values(run.folder, "base")[str(run.folder)] and len(set(one.values())) == 3


WRONG = {
    "an unknown task": (
        ["--tasks", "choise", "--tasks-path", "TASKS"],
        "is not a task; did you mean 'choice'",
    ),
    "no task": (["--tasks", ","], "--tasks: no task is named"),
    "an empty name": (["--tasks", ""], "--tasks: no task is named"),
    "no folder of tasks": (["--tasks", "choice", "--tasks-path", "nowhere"], "--tasks-path: nowhere is not a folder"),
    "a limit of none": (["--tasks", "choice", "--limit", "0"], "--limit"),
    "no tasks": (["--limit", "4"], "Missing option '--tasks'"),
    "an option of eval": (["--tasks", "choice", "--rows", "4"], "No such option: --rows"),
    "a baseline of none": (["--tasks", "choice", "--baseline", "other"], "--baseline: other: not one of the models"),
    "a file for a folder": (["--tasks", "choice", "--output", "FILE"], "a.txt is a file. Give --output DIR, a folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    case,
    run,
    lorakit_benchmark,
    task_folder,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr("lorakit.evaluate.benchmarks.harness.TaskManager", without_lm_evals_own)
    (tmp_path / "a.txt").touch()
    known = {"TASKS": task_folder(choice=CHOICE), "FILE": tmp_path / "a.txt"}
    arguments, reason = WRONG[case]
    code, out, err = lorakit_benchmark(run.folder, *(known.get(word, word) for word in arguments), "-q")
    assert (code, out) == (2, ""), err
    assert reason in err and "Traceback" not in err


def test_no_chat_template_is_said_before_a_model_is_loaded(
    tiny_base,
    tmp_path,
    lorakit_benchmark,
    task_folder,  # noqa: F811
    loads,
):
    bare = shutil.copytree(tiny_base, tmp_path / "bare")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    options = ("--tasks", "choice", "--tasks-path", task_folder(choice=CHOICE), "--chat-template")
    code, _, err = lorakit_benchmark(bare, *options)
    assert code == 2 and "no chat template" in err and loads == []
