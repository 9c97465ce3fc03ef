"""Benchmarks through lm-eval: its own figures, with lorakit's intervals, from local task files without a network."""

import copy
import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOPICS
from test_smollm2 import SMOL
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lorakit[tasks]'")
from lm_eval.models.huggingface import HFLM

from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.benchmarks.confined_code import ConfinedCode
from lorakit.evaluate.benchmarks.lm_eval_model import LmEvalModel
from lorakit.evaluate.benchmarks.run import compare_tasks, open_tasks, run_tasks
from lorakit.evaluate.benchmarks.settings import BenchmarkSettings
from lorakit.evaluate.classification import score_labels
from lorakit.evaluate.forward import label_loglikelihoods
from lorakit.progress import Silent

LABELS = ["apples", "rivers and more", "a", "two bridges over a river"]
CHOICE = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": LABELS,
    "doc_to_target": "label",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm", "acc_bytes")
    ]
    + [{"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}],
}
TEXTS = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}
ANSWERS = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def questions(count, seed=3):
    generator = np.random.default_rng(seed)
    return [
        {
            "question": f"Tell me about {TOPICS[i % 8]}{' and more' * (i % 3)}, number {i}.",
            "label": int(generator.integers(0, len(LABELS))),
            "answer": TOPICS[i % 8],
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def harness():
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lorakit[tasks]'")


@pytest.fixture
def task_folder(harness, tmp_path):
    """Write task files, each on its own rows; settings that are `...` are taken out."""

    def write(rows=30, **tasks):
        for number, (name, config) in enumerate(tasks.items()):
            if "group" not in config:
                data = tmp_path / f"{name}.jsonl"
                lines = [json.dumps(row) + "\n" for row in questions(rows + 10 * number, seed=number)]
                data.write_text("".join(lines), encoding="utf-8")
                kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
                config = {"task": name, "dataset_kwargs": kwargs, **config}
            kept = {key: value for key, value in config.items() if value is not ...}
            (tmp_path / f"{name}.yaml").write_text(json.dumps(kept), encoding="utf-8")
        return tmp_path

    return write


@pytest.fixture(scope="module")
def model(harness, tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


def run(model, tokenizer, names, folder, limit=None, progress=None, variables=None, **more):
    settings = BenchmarkSettings(tuple(names), folder, limit, **more)
    progress = progress or Silent()
    return run_tasks(model, tokenizer, open_tasks(settings, progress), settings, progress, variables, "base: tasks")


def by_metric(scores, task):
    return {score.metric: score for score in scores if score.task == task}


def assert_classification_agrees(model, tokenizer, rows, scores):
    prompts = [tokenizer.encode(f"Question: {row['question']}\nAnswer:") for row in rows]
    labels = [tokenizer.encode(f" {label}") for label in LABELS]
    likely = label_loglikelihoods(model, prompts, labels, 0, Silent())
    ours = score_labels(likely, [row["label"] for row in rows], LABELS)
    theirs = by_metric(scores, "choice")
    assert theirs["acc"].value == pytest.approx(ours.measures["accuracy"].value, abs=1e-3)
    assert theirs["acc_norm"].value == pytest.approx(ours.measures["accuracy-norm"].value, abs=1e-3)
    assert theirs["acc_bytes"].value == pytest.approx(ours.measures["accuracy-bytes"].value, abs=1e-3)
    assert theirs["brier_score"].value == pytest.approx(ours.measures["brier"].value, abs=1e-3)
    return ours


def test_likelihood_classification_agrees_with_lm_eval(model, tokenizer, task_folder):
    """A tiny model finds much the same label everywhere, so its head is sharpened: the labels then vary by row."""
    sharp = copy.deepcopy(model)
    with torch.no_grad():
        sharp.lm_head.weight.mul_(60)
    scores = run(sharp, tokenizer, ["choice"], task_folder(rows=120, choice=CHOICE))
    ours = assert_classification_agrees(sharp, tokenizer, questions(120, seed=0), scores)
    assert (ours.confusion.sum(0) > 0).sum() > 1
    assert len({round(ours.measures["accuracy"].value, 3), round(ours.measures["accuracy-norm"].value, 3)}) == 2


@pytest.mark.slow
@pytest.mark.smollm2
def test_likelihood_classification_agrees_with_lm_eval_on_smollm2(users_cache, task_folder):
    from lorakit.model.load import load_model
    from lorakit.model.resolve import resolve_base
    from lorakit.model.tokenizer import load_tokenizer
    from lorakit.recipe.schema import Model

    base = resolve_base(SMOL, "main", Silent())
    tokenizer = load_tokenizer(base, None)
    real = load_model(base, Model(base=SMOL, dtype="float32", attention="sdpa"), "cpu")
    scores = run(real, tokenizer, ["choice"], task_folder(choice=CHOICE), limit=12)
    assert_classification_agrees(real, tokenizer, questions(30, seed=0)[:12], scores)


def test_every_figure_is_lm_evals_and_its_measure_makes_the_same(model, tokenizer, task_folder):
    folder = task_folder(choice=CHOICE, texts=TEXTS, answers=ANSWERS)
    scores = run(model, tokenizer, ["choice", "texts", "answers"], folder)
    assert [score.name for score in scores] == [
        "choice acc", "choice acc_norm", "choice acc_bytes", "choice brier_score",
        "texts word_perplexity", "texts bits_per_byte", "answers exact_match",
    ]  # fmt: skip
    for score in scores:
        assert score.measure.value == pytest.approx(score.value, rel=1e-9), score.name
        assert len(score.rows_of) == len(score.measure.rows)
        assert score.interval.low <= score.value <= score.interval.high
        assert score.interval.low < score.interval.high
    assert [score.higher for score in scores] == [True, True, True, False, False, False, True]
    assert {score.interval.method for score in scores if score.metric.startswith("acc")} == {"wilson"}


def test_a_group_is_the_mean_of_its_rows_or_of_its_tasks(model, tokenizer, task_folder):
    parts = {"one": CHOICE, "two": CHOICE}
    by_rows = {"group": "rows", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]}
    alike = by_rows | {"group": "alike", "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}]}
    folder = task_folder(20, **parts, by_rows=by_rows)
    (folder / "alike.yaml").write_text(json.dumps(alike), encoding="utf-8")
    # Names of groups need the index of all tasks, which takes many seconds: the test leaves lm-eval's own out.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorakit.evaluate.benchmarks.harness.TaskManager", without_lm_evals_own)
        for group in ("rows", "alike"):
            scores = run(model, tokenizer, [group], folder)
            whole, one, two = (by_metric(scores, name)["acc"] for name in (group, "one", "two"))
            assert tuple(len(part.rows_of) for part in (one, two, whole)) == (20, 30, 50)
            assert (whole.within, one.within, two.within) == ("", group, group)
            expected = (20 * one.value + 30 * two.value) / 50 if group == "rows" else (one.value + two.value) / 2
            assert whole.value == pytest.approx(expected)
            assert whole.measure.value == pytest.approx(expected)
            assert whole.interval.low < whole.value < whole.interval.high


def test_single_tasks_of_lm_eval_need_no_index_of_all(monkeypatch, tmp_path):
    from lorakit.evaluate.benchmarks.harness import _open_manager

    monkeypatch.setattr("lorakit.evaluate.benchmarks.harness.TaskManager", without_lm_evals_own)
    (tmp_path / "choice.yaml").write_text(json.dumps(CHOICE | {"task": "choice"}), encoding="utf-8")
    index = _open_manager(["gsm8k", "humaneval", "choice"], tmp_path).task_index
    assert {"gsm8k", "humaneval", "choice"} <= index.keys()
    assert len(index) < 50


def without_lm_evals_own(include_path, include_defaults=True):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=False)


def test_two_models_are_compared_on_the_same_samples(model, tokenizer, task_folder):
    folder = task_folder(choice=CHOICE, texts=TEXTS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    first, second = (run(one, tokenizer, ["choice", "texts"], folder) for one in (model, other))
    found = compare_tasks(first, second)
    for one, two in zip(first, second, strict=True):
        assert found[one.name].difference == pytest.approx(two.value - one.value)
    # A head of random weights that is surer of itself is worse at every text.
    assert found["texts word_perplexity"].verdict == "worse"
    with pytest.raises(LorakitError, match="30 rows and the other on 10, which are not the same"):
        compare_tasks(first, run(other, tokenizer, ["choice"], folder, limit=10))


def test_the_same_seed_gives_the_same_and_an_adapter_is_scored(model, tokenizer, task_folder):
    from peft import LoraConfig, get_peft_model

    folder = task_folder(texts=TEXTS)
    plain, again = (run(model, tokenizer, ["texts"], folder) for _ in range(2))
    assert [(one.value, one.interval) for one in plain] == [(one.value, one.interval) for one in again]
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert run(adapted, tokenizer, ["texts"], folder)[0].value != plain[0].value
    with adapted.disable_adapter():
        assert run(adapted, tokenizer, ["texts"], folder)[0].value == pytest.approx(plain[0].value)


def test_a_head_trained_beside_an_adapter_on_a_tied_base_stays_untied(tokenizer, task_folder):
    """lm-eval ties the weights of a model that it is given, which would put the base's embeddings into the head."""
    from conftest import TINY_LLAMA
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    tied = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **TINY_LLAMA))
    adapted = get_peft_model(tied, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
        before = adapted(ids).logits
        run(adapted, tokenizer, ["texts"], task_folder(texts=TEXTS), limit=2)
        assert torch.equal(adapted(ids).logits, before)


def test_prompts_are_plain_unless_the_chat_template_is_asked_for(model, tokenizer, task_folder):
    folder = task_folder(choice=CHOICE)
    plain, chat = (by_metric(run(model, tokenizer, ["choice"], folder, chat=chat), "choice") for chat in (False, True))
    assert plain["brier_score"].value != chat["brier_score"].value


def test_several_models_share_the_tasks_that_were_read_once(model, tokenizer, task_folder):
    settings = BenchmarkSettings(("choice", "answers"), task_folder(choice=CHOICE, answers=ANSWERS), 8, shots=1)
    tasks = open_tasks(settings, Silent())
    of_each = [run_tasks(model, tokenizer, tasks, settings, Silent()) for _ in range(2)]
    fresh = run_tasks(model, tokenizer, open_tasks(settings, Silent()), settings, Silent())
    expected = [(one.name, one.value, one.rows_of, 1) for one in fresh]
    for scores in (*of_each, fresh):
        assert [(one.name, one.value, one.rows_of, one.shots) for one in scores] == expected


def test_chat_prompts_get_the_variables_of_the_template(model, tokenizer, task_folder):
    toned = copy.deepcopy(tokenizer)
    toned.chat_template = "{{ tone or 'plain' }}" + tokenizer.chat_template
    folder = task_folder(choice=CHOICE)
    chat = [
        by_metric(run(model, toned, ["choice"], folder, chat=True, variables=variables), "choice")["brier_score"].value
        for variables in ({}, {"tone": "plain"}, {"tone": "formal"})
    ]
    assert chat[0] == chat[1] != chat[2]


def test_a_local_task_asks_no_network_and_prints_nothing(model, tokenizer, task_folder, monkeypatch, capsys):
    import datasets
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: asked.append(given) or [])
    folder = task_folder(choice=CHOICE, answers=ANSWERS)
    run(model, tokenizer, ["choice", "answers"], folder, limit=3)
    assert asked == []
    said = capsys.readouterr()
    assert said.out == ""
    assert "Running" not in said.err and "it/s" not in said.err


def test_progress_counts_the_requests(model, tokenizer, task_folder):
    listener = Counting()
    run(model, tokenizer, ["choice"], task_folder(choice=CHOICE), 5, listener)
    assert listener.bars == {"base: tasks: likelihoods": [20, 20]}


class Counting(Silent):
    def __init__(self):
        self.bars, self.warnings = {}, []

    def warn(self, text):
        self.warnings.append(text)

    def bar(self, label, total, done=0, unit=""):
        from contextlib import contextmanager

        @contextmanager
        def counted():
            self.bars[label] = [total, 0]
            yield type("Bar", (), {"advance": lambda bar, amount=1, note="": self.add(label, amount)})()

        return counted()

    def add(self, label, amount):
        self.bars[label][1] += amount


def test_a_label_that_is_none_of_the_choices_is_said_once(model, tokenizer, task_folder):
    listener = Counting()
    out_of_place = CHOICE | {"doc_to_target": "{{ 9 if label == 0 else label }}", "metric_list": [{"metric": "acc"}]}
    folder = task_folder(choice=out_of_place)
    assert [row["label"] for row in questions(30, seed=0)].count(0) > 1
    run(model, tokenizer, ["choice"], folder, None, listener)
    assert len([text for text in listener.warnings if "Label index was not in within range" in text]) == 1


# What a person gets wrong, and what the error says.
WRONG = {
    "a broken file": ("choice.yaml", "task: [1,\n  b: }", "choice.yaml:2:"),
    "no mapping": ("other.yaml", "- 1", "other.yaml: a task file is a mapping"),
    "a lost include": ("other.yaml", "include: base.yaml\ntask: x", "include: there is no file base.yaml"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_broken_task_file_is_an_error_with_its_place(case, model, tokenizer, task_folder):
    folder = task_folder(choice=CHOICE)
    name, text, message = WRONG[case]
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        run(model, tokenizer, ["choice"], folder)


UNUSABLE = {
    "a misspelt setting": ({"doc_to_tex": "x"}, "cannot make a task of its file: .*doc_to_tex"),
    "no such split": ({"test_split": "held"}, "cannot make a task of its file: KeyError: .*held"),
    "no data": (
        {"dataset_kwargs": {"data_files": "gone.jsonl"}},
        "gone.jsonl.*are relative to the folder",
    ),
    "a misspelt metric": ({"metric_list": [{"metric": "acc_nrm"}]}, "no metric 'acc_nrm'; did you mean 'acc_norm'"),
    "a script of the hub": ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "fetches a script"),
    "generated code": ({"unsafe_code": True}, "runs the Python that the model writes.*--allow-code"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_task_that_cannot_be_used_says_why(case, model, tokenizer, task_folder):
    change, message = UNUSABLE[case]
    with pytest.raises(UserError, match=message):
        run(model, tokenizer, ["choice"], task_folder(choice=CHOICE | change))


PROBLEMS = [
    {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() is None"},
    {"prompt": "def f():\n    return 1\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1"},
    {"prompt": "def f():\n    while True: pass\n", "entry_point": "f", "test": "def check(f):\n    f()"},
]


def humaneval(folder, **changes):
    """lm-eval's own HumanEval under another name, on problems of ours whose answers the model adds nothing to."""
    from lm_eval import tasks

    source = Path(tasks.__file__).parent / "humaneval"
    config = (source / "humaneval.yaml").read_text().replace("task: humaneval", "task: problems")
    for old, new in changes.items():
        config = config.replace(old, new)
    (folder / "problems.yaml").write_text(config.replace("max_gen_toks: 1024", "max_gen_toks: 1"))
    (folder / "utils.py").write_text((source / "utils.py").read_text())
    (folder / "HumanEval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return folder


def test_generated_code_runs_confined_where_it_is_allowed_by_hand(model, tokenizer, tmp_path, monkeypatch):
    """The right program, a program that is no Python after what the model adds, and an endless one."""
    monkeypatch.setattr(ConfinedCode.compute, "__defaults__", (*ConfinedCode.compute.__defaults__[:-1], 0.5))
    folder = humaneval(tmp_path)
    with pytest.raises(UserError, match=r"problems runs the Python that the model writes.*--allow-code"):
        run(model, tokenizer, ["problems"], folder, data=folder)
    monkeypatch.setattr(LmEvalModel, "_greedy", lambda self, requests: ["", "    return 2", ""][: len(requests)])
    (score,) = run(model, tokenizer, ["problems"], folder, data=folder, allow_code=True)
    assert score.name == "problems pass@1 (create_test)" and len(score.rows_of) == 3
    assert score.value == pytest.approx(1 / 3)


def test_code_that_a_task_runs_by_itself_is_refused(model, tokenizer, tmp_path):
    """lm-eval's flag says that a task runs code, not how: what is not the confined metric's would be free."""
    folder = humaneval(tmp_path)
    (folder / "utils.py").write_text(
        "def pass_at_k(references, predictions, k):\n    return 1\n\n"
        "def build_predictions(resps, docs):\n    return resps\n"
    )
    with pytest.raises(UserError, match="problems runs the code that models write by a program of its own"):
        run(model, tokenizer, ["problems"], folder, data=folder, allow_code=True)


def generations(prompts, text):
    """Requests of lm-eval for answers that end at a text."""
    from lm_eval.api.instance import Instance

    settings = {"until": [text, "</s>"], "max_gen_toks": 24, "do_sample": False}
    return [Instance("generate_until", {}, (request, dict(settings)), at) for at, request in enumerate(prompts)]


@pytest.mark.parametrize("ends", [None, 5])
def test_answers_are_those_of_lm_eval_with_any_stop_text(model, tokenizer, harness, ends):
    """Each text of two tokens that the model writes somewhere is a stop text once; some answers go on to the end."""
    lm = LmEvalModel(model, tokenizer, None, "base", Silent())
    prompts = [f"Question: {row['question']}\nAnswer:{' so' * (at % 5)}" for at, row in enumerate(questions(12))]
    model.generation_config.eos_token_id = ends
    written = HFLM.generate_until(lm, generations(prompts, "\0"))
    assert len(set(written)) > 1
    for at in (3, 9, 16):
        requests = generations(prompts, written[0][at : at + 4])
        theirs = HFLM.generate_until(lm, requests)
        assert lm.generate_until(requests) == theirs and any(
            one != two for one, two in zip(theirs, written, strict=True)
        )


def test_a_model_whose_own_settings_are_more_than_greedy_is_left_to_lm_eval(model, tokenizer, harness):
    own = copy.deepcopy(model)
    own.generation_config.repetition_penalty = 1.5
    lm = LmEvalModel(own, tokenizer, None, "base", Silent())
    prompts = [f"Question: {row['question']}\nAnswer:" for row in questions(4)]
    requests = generations(prompts, "\0")
    theirs = HFLM.generate_until(lm, requests)
    assert lm.generate_until(requests) == theirs
    plain = LmEvalModel(model, tokenizer, None, "base", Silent())
    assert plain.generate_until(generations(prompts, "\0")) != theirs


def test_a_column_that_is_not_there_fails_without_a_traceback(model, tokenizer, task_folder):
    with pytest.raises(LorakitError, match="question_text"):
        run(model, tokenizer, ["choice"], task_folder(choice=CHOICE | {"doc_to_text": "{{question_text}}"}))


def test_unknown_tasks_are_errors_that_list_the_folders_own(model, tokenizer, task_folder, monkeypatch):
    monkeypatch.setattr("lorakit.evaluate.benchmarks.harness.TaskManager", without_lm_evals_own)
    folder = task_folder(choice=CHOICE, texts=TEXTS)
    with pytest.raises(UserError, match="'choise' is not a task; did you mean 'choice'"):
        run(model, tokenizer, ["choise"], folder)
    with pytest.raises(UserError, match=r"'zzz' is not a task. .* has: choice, texts"):
        run(model, tokenizer, ["zzz"], folder)
    with pytest.raises(UserError, match="is not a folder"):
        run(model, tokenizer, ["choice"], folder / "gone")


@pytest.fixture
def offline(monkeypatch):
    """Both libraries read the variable when they are imported, which may be before the tests set it."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_data_of_the_hub_without_a_network_names_the_dataset(offline, model, tokenizer, task_folder):
    away = {"dataset_path": "someone/some-questions", "dataset_name": "main", "dataset_kwargs": ...}
    with pytest.raises(LorakitError, match=r"from the hub: someone/some-questions \(main\)") as refused:
        run(model, tokenizer, ["choice"], task_folder(choice=CHOICE | away))
    assert refused.value.exit_code == 1


def test_without_lm_eval_the_error_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'lorakit\[tasks\]'"):
        run(None, tokenizer, ["gsm8k"], None)


@pytest.mark.slow
def test_lm_evals_own_names_are_known(offline, model, tokenizer):
    """MMLU and GSM8K by name: here the hub is not reachable, and the error names the datasets. HumanEval is refused."""
    for name, dataset in (("gsm8k", r"openai/gsm8k \(main\)"), ("mmlu_anatomy", r"cais/mmlu \(anatomy\)")):
        with pytest.raises(LorakitError, match=f"from the hub: {dataset}"):
            run(model, tokenizer, [name], None)
    with pytest.raises(UserError, match="humaneval runs the Python that the model writes"):
        run(model, tokenizer, ["humaneval"], None)
    with pytest.raises(UserError, match="'gsm8l' is not a task; did you mean"):
        run(model, tokenizer, ["gsm8l"], None)
