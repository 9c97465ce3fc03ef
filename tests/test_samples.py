"""Samples as it learns: the same held-out rows are answered at each evaluation, and the training does not notice."""

import json
import shutil
import tarfile

import pytest
import torch
import yaml
from conftest import write_rows
from distributed_runs import train_on
from eval_runs import Remembers, make_run
from markupsafe import escape
from runs_of_tests import adapter_weights, run_recipe
from test_training import interrupted_after

from lorakit.errors import Interrupted
from lorakit.evaluate.models import models_of_run
from lorakit.evaluate.run import default_settings, score_models
from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.report.samples import learned_rows
from lorakit.report.watch import RunWatch, frame
from lorakit.report.write import write_report
from lorakit.run_dir import Run

SAMPLES = {"evaluate": {"samples": 3}}
DROPOUT = {"rank": 4, "alpha": 8, "dropout": 0.2}
KINDS = {
    "lora": {"adapter": DROPOUT},
    "dora nf4, recomputed": {
        "adapter": {**DROPOUT, "kind": "dora"},
        "model": {"quantization": "nf4"},
        "train": {"gradient_checkpointing": True},
    },
    "packed": {"adapter": DROPOUT, "data": {"packing": "on"}},
    "bfloat16": {"adapter": DROPOUT, "model": {"dtype": "bfloat16"}},
    "varlen": {"adapter": DROPOUT, "data": {"packing": "on"}, "model": {"attention": "varlen"}},
    "q8": {"adapter": DROPOUT, "model": {"quantization": "q8"}},
    "adalora": {"adapter": {"kind": "adalora"}},
    "full": {"adapter": {"kind": "none", "rank": ..., "alpha": ...}},
    "compiled": {"adapter": DROPOUT, "train": {"compile": "on"}},
}
SLOW = ("bfloat16", "q8", "adalora", "full", "compiled")


def samples_of(run: Run) -> dict[int, list[dict]]:
    """The answers of a run's log by step."""
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    return {line["step"]: line["samples"] for line in lines if "samples" in line}


def weights_of(run: Run) -> dict:
    from safetensors.torch import load_file

    return load_file(run.model / "model.safetensors") if run.model.exists() else adapter_weights(run)


@pytest.mark.parametrize("kind", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in KINDS])
def test_answering_rows_changes_no_bit_of_what_is_trained(recipe_file, tmp_path, kind):
    sections, progress = KINDS[kind], Remembers()
    without, _ = run_recipe(recipe_file(**sections), tmp_path / "without")
    given = {**sections, "evaluate": {"samples": 2}}
    with_samples, _ = run_recipe(recipe_file(**given), tmp_path / "with", progress=progress)
    ours, theirs = weights_of(without), weights_of(with_samples)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [[one["row"] for one in of] for of in samples_of(with_samples).values()] == [
        ["eval.jsonl:1", "eval.jsonl:2"]
    ] * 3
    assert not [warning for warning in progress.warned if "samples" in warning]
    assert len([line for line in progress.said if line.startswith("after step 12, eval.jsonl:")]) == 2


def test_the_answers_are_those_of_lorakit_eval(recipe_file, tmp_path):
    """Of the same rows by the same weights, each with its prompt and its reference in samples.jsonl."""
    run, outcome = run_recipe(recipe_file(train={"learning_rate": 0.02}, **SAMPLES), tmp_path / "run")
    prepared = reopen_run(run.folder, Silent())[1]
    scored = score_models(models_of_run(run, prepared), None, default_settings(prepared), Silent())
    adapter = next(model for model in scored.models if model.spec.kind == "adapter")
    logged = samples_of(run)[outcome.best_step]
    assert [one["answer"] for one in logged] == adapter.answers[:3]
    assert [not one.get("cut", False) for one in logged] == adapter.ended[:3]
    rows = run.read_sampled_rows()
    assert [one["row"] for one in logged] == ["eval.jsonl:1", "eval.jsonl:2", "eval.jsonl:3"]
    assert [row["reference"] for row in rows] == adapter.rendered.references[:3]
    assert [row["prompt"] for row in rows] == list(map(prepared.tokenizer.decode, adapter.rendered.prompts[:3]))


@pytest.mark.parametrize("step", [6, 8])
def test_a_resumed_run_has_each_answer_once(recipe_file, tmp_path, monkeypatch, step):
    """Stopped between two evaluations, and just before one, which is made up."""
    path = recipe_file(adapter=DROPOUT, **SAMPLES)
    straight, _ = run_recipe(path, tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupted_after(step, patch)
        with pytest.raises(Interrupted):
            run_recipe(path, tmp_path / "run")
    resumed, _ = run_recipe(path, tmp_path / "run", resume=True)
    lines = [json.loads(line) for line in resumed.log.read_text().splitlines() if '"samples"' in line]
    assert [line["step"] for line in lines] == [4, 8, 12] and samples_of(resumed) == samples_of(straight)


def test_answers_that_are_made_up_again_take_the_place_of_the_first(tmp_path):
    run = Run(tmp_path)
    for line in ({"step": 4, "loss": 1.0}, {"step": 4, "eval_loss": 2.0}, {"step": 4, "samples": []}):
        run.log_line(line)
    run.forget_evaluation(4)
    assert run.log.read_text() == '{"step": 4, "loss": 1.0}\n'


def test_a_prompt_may_have_line_separators_of_unicode(tmp_path):
    run = Run(tmp_path)
    row = {"where": "eval.jsonl:1", "prompt": "one\u2028two", "reference": "three\x85four"}
    run.samples.write_text(
        json.dumps({"where": "a", "stretches": []}) + "\n" + json.dumps(row, ensure_ascii=False) + "\n"
    )
    assert run.read_sampled_rows() == [{"prompt": "one\u2028two", "reference": "three\x85four"}]


def test_a_run_whose_rows_cannot_be_answered_goes_on_without(recipe_file, tmp_path, monkeypatch):
    """Memory runs out on one row alone: it is said once, and not tried again."""
    asked = []

    def full(*arguments, **named):
        asked.append(arguments)
        raise torch.OutOfMemoryError("not enough memory")

    monkeypatch.setattr("lorakit.model.generation._continue", full)
    progress = Remembers()
    run, outcome = run_recipe(recipe_file(**SAMPLES), tmp_path / "run", progress=progress)
    (warning,) = [warning for warning in progress.warned if "samples" in warning]
    assert "after step 4" in warning and "out of memory" in warning and "goes on without" in warning
    assert outcome.steps == 12 and len(asked) == 2 and samples_of(run) == {}  # three rows, then one


def test_rows_without_a_prompt_are_not_answered(recipe_file, tmp_path):
    path = recipe_file(**SAMPLES)
    write_rows(tmp_path / "eval.jsonl", [{"text": "apples and rivers"}, {"text": "lamps"}])
    write_rows(tmp_path / "train.jsonl", [{"text": f"rivers and lamps {number}"} for number in range(22)])
    progress = Remembers()
    run, _ = run_recipe(path, tmp_path / "run", progress=progress)
    (warning,) = [warning for warning in progress.warned if "samples" in warning]
    assert "evaluate.samples: 3: only 0 of the 2 held-out rows have a prompt and an answer" in warning
    assert samples_of(run) == {}


@pytest.mark.parametrize(
    ("value", "words"), [("-1", "evaluate.samples"), ("0.5", "evaluate.samples"), ("all", "evaluate.samples")]
)
def test_a_number_of_rows_is_a_whole_one(recipe_file, lorakit, value, words):
    code, _, err = lorakit("check", recipe_file(), "--set", f"evaluate.samples={value}")
    assert code == 2 and words in err


def test_samples_without_held_out_rows_are_an_error_of_the_recipe(recipe_file, lorakit):
    code, _, err = lorakit("check", recipe_file(**SAMPLES), "--set", "data.eval=null")
    assert code == 2 and "evaluate.samples" in err and "no held-out rows to answer" in err


@pytest.mark.parametrize(
    "sharding", ["none", *(pytest.param(one, marks=pytest.mark.slow) for one in ("fsdp", "zero-2", "zero-3"))]
)
def test_several_processes_answer_as_one_does_and_the_first_writes(recipe_file, tmp_path, sharding):
    if sharding.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra lorakit[deepspeed] is not installed")
    path = recipe_file(train={"steps": 4, "epochs": ..., "batch_size": 5, "learning_rate": 0.02}, **SAMPLES)
    one, _ = run_recipe(path, tmp_path / "one")
    several, _ = train_on(2, path, tmp_path / "two", f"train.sharding={sharding}")
    assert samples_of(several) == samples_of(one) and list(samples_of(one)) == [4]


HOSTILE = "</script><script>document.title='run'</script>{{ 7*7 }}\x1b[31m"


@pytest.fixture(scope="module")
def answered(tmp_path_factory, tiny_base):
    """A run that answered two rows three times; one answer would be script."""
    run = make_run(tmp_path_factory.mktemp("answered"), tiny_base, train={"eval_every": 2}, evaluate={"samples": 2})
    answers = {2: HOSTILE, 4: "the same", 6: "the same"}
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    for line in lines:
        if "samples" in line:
            line["samples"][0] = {"row": "eval.jsonl:1", "answer": answers[line["step"]], "cut": True}
    run.log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_the_report_shows_prompt_reference_and_the_answers_of_each_evaluation_as_text(answered, tmp_path):
    facts = write_report([answered.folder], tmp_path / "page.html", 500)
    page = (tmp_path / "page.html").read_text()
    assert page.count('<details class="row learned"') == 2 and page.count("<script>") == 1
    assert "&lt;/script&gt;&lt;script&gt;" in page and "{{ 7*7 }}" in page and ">4 to 6<" in page
    references = [str(escape(row["reference"])) for row in answered.read_sampled_rows()]
    assert all(reference in page for reference in references) and facts["bytes"] < 3_000_000


def test_of_many_answers_the_page_shows_some_and_of_long_ones_the_beginning(tmp_path):
    run = Run(tmp_path)
    for step in range(1, 1001):
        samples = [{"row": f"eval.jsonl:{row + 1}", "answer": f"{step} " * 5_000} for row in range(20)]
        run.log_line({"step": step, "samples": samples[: 20 if step > 995 else 1]})
    rows = learned_rows(run)
    assert len(rows) == 10 and max(len(row.answers) for row in rows) == 12
    steps = [answer.steps for answer in rows[0].answers]
    assert (steps[0], steps[-1], rows[0].left_out) == ("1", "1,000", 988)
    assert sum(len(answer.text) for row in rows for answer in row.answers) < 100_000


def test_watch_shows_the_newest_answers_where_there_is_room(answered):
    def head(height):
        watch = RunWatch(answered)
        return frame(watch, watch.look(), 80, height).head

    assert "held-out rows answered after step 6:\n  eval.jsonl:1: the same\n  " in head(24)
    assert "held-out rows" not in head(14)


def test_a_page_of_a_log_without_samples_is_as_before(answered, tmp_path):
    """As of a run of an older version."""
    run = Run(tmp_path / "run")
    shutil.copytree(answered.folder, run.folder)
    lines = run.log.read_text().splitlines(keepends=True)
    run.log.write_text("".join(line for line in lines if "samples" not in line))
    write_report([run.folder], tmp_path / "page.html", 500)
    page = (tmp_path / "page.html").read_text()
    assert "Samples as it learned" not in page and "Damaged" not in page


def test_a_pack_has_answers_only_beside_the_rows(answered, tmp_path, lorakit):
    for name, options in {"plain": [], "rows": ["--held-out-rows"]}.items():
        packed = tmp_path / f"{name}.tar"
        code, _, err = lorakit("pack", answered.folder, "-o", packed, *options)
        assert code == 0, err
        with tarfile.open(packed) as archive:
            member = next(one for one in archive.getmembers() if one.name.endswith("log.jsonl"))
            log = archive.extractfile(member).read().decode()
        assert ("the same" in log) == (name == "rows") and '"eval_loss"' in log


@pytest.mark.parametrize(("held_out", "expected"), [(0.2, {"samples": 5}), (0, {})])
def test_axolotls_table_of_predictions_is_imported(recipe_file, tmp_path, lorakit, held_out, expected):
    recipe_file()
    config = {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "datasets": [{"path": "train.jsonl", "type": "chat_template"}],
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "learning_rate": 2e-4,
        "val_set_size": held_out,
        "eval_table_size": 5,
    }
    (tmp_path / "theirs.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    code, out, err = lorakit("import", tmp_path / "theirs.yml", "--output", tmp_path / "ours.yaml")
    assert code == 0, out + err
    assert yaml.safe_load((tmp_path / "ours.yaml").read_text(encoding="utf-8")).get("evaluate", {}) == expected
