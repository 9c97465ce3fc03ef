"""Data of benchmarks from a folder: as published, as on the hub, and what is missing."""

import gzip
import json
from itertools import count

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lorakit[tasks]'")

import datasets

from lorakit.errors import UserError
from lorakit.evaluate.benchmarks.local_data import LocalData
from lorakit.evaluate.benchmarks.published import differences
from lorakit.evaluate.benchmarks.task_score import TaskScore

HUB_CACHE = "datasets--openai--gsm8k/snapshots/a1"
numbers = count()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def rows(size=2):
    """Rows that no other test has."""
    return [{"question": f"What is {next(numbers)}?", "answer": "#### 1"} for _ in range(size)]


def write(path, some):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in some)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def held(splits):
    return {name: list(splits[name]) for name in splits}


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("openai/gsm8k", ("gsm8k-test.jsonl", "gsm8k-train-part.jsonl")),
        ("openai/gsm8k", ("GSM8K_test.jsonl", "sub/gsm8k.train.jsonl")),
        ("openai/gsm8k", ("gsm8k/test.jsonl", "gsm8k/train.jsonl")),
        ("openai/gsm8k", ("openai/gsm8k/test.jsonl", "openai/gsm8k/train.jsonl")),
        ("openai/gsm8k", ("openai/gsm8k/main/test.jsonl", "openai/gsm8k/main/train.jsonl")),
        ("openai/gsm8k", (f"{HUB_CACHE}/main/test.jsonl", f"{HUB_CACHE}/main/train.jsonl")),
        ("openai/openai_humaneval", ("HumanEval-test.jsonl.gz", "openai_humaneval-train.jsonl")),
    ],
)
def test_a_data_set_is_recognised_however_it_lies_there(tmp_path, path, names):
    test, train = rows(3), rows(2)
    write(tmp_path / names[0], test)
    write(tmp_path / names[1], train)
    write(tmp_path / "other-test.jsonl", rows(1))
    splits = LocalData(tmp_path).load(path, "main")
    assert held(splits) == {"test": test, "train": train}


def test_a_file_that_names_no_split_is_what_is_scored(tmp_path):
    some = rows(3)
    write(tmp_path / "HumanEval.jsonl.gz", some)
    splits = LocalData(tmp_path).load("openai/openai_humaneval", None)
    assert list(splits["test"]) == some == list(splits["validation"])
    with pytest.raises(UserError, match=r"needs the split 'train' of openai/openai_humaneval.*openai_humaneval-train"):
        splits["train"]


def test_the_parts_of_a_data_set_on_the_hub_are_those_of_its_page(tmp_path):
    one, two = rows(2), rows(3)
    write(tmp_path / "gsm8k/a/x.jsonl", one)
    write(tmp_path / "gsm8k/b/x.jsonl", two)
    page = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {folder}/x.jsonl\n"
        for name, folder in (("main", "a"), ("socratic", "b"))
    )
    (tmp_path / "gsm8k/README.md").write_text(page + "---\n")
    data = LocalData(tmp_path)
    assert held(data.load("openai/gsm8k", "main")) == {"test": one}
    assert held(data.load("openai/gsm8k", "socratic")) == {"test": two}


def test_mmlu_is_read_from_its_authors_files(tmp_path):
    for folder, word in (("dev", "dev"), ("test", "test"), ("val", "val")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        text = f'"Which, of {next(numbers)}?",one,2,NA,"fo""ur",C\nPlain {word}?,a,b,c,d,A\n'
        (tmp_path / "data" / folder / f"anatomy_{word}.csv").write_text(text)
    splits = held(LocalData(tmp_path).load("cais/mmlu", "anatomy"))
    assert splits.keys() == {"dev", "test", "validation"}
    first, second = splits["test"]
    assert (first["choices"], first["answer"]) == (["one", "2", "NA", 'fo"ur'], 2)
    assert second == {"question": "Plain test?", "choices": ["a", "b", "c", "d"], "answer": 0}
    with pytest.raises(UserError, match="has no data for cais/mmlu"):
        LocalData(tmp_path).load("cais/mmlu", "astronomy")


def test_what_is_missing_or_twice_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        LocalData(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no data for openai/gsm8k.*gsm8k-test.jsonl"):
        LocalData(tmp_path).load("openai/gsm8k", "main")
    for name in ("gsm8k-test.jsonl", "gsm8k-test-new.jsonl"):
        write(tmp_path / name, rows(1))
    with pytest.raises(UserError, match="both look like the split 'test' of gsm8k"):
        LocalData(tmp_path).load("openai/gsm8k", "main")


@pytest.mark.parametrize(
    ("name", "text"),
    [("gsm8k-test.jsonl", '{"question": '), ("gsm8k/README.md", "nothing"), ("mmlu/anatomy_test.csv", "a,b,c,d,e,F\n")],
)
def test_files_that_cannot_be_read_are_said_to_be_the_folders_and_not_the_hubs(tmp_path, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    path, part = ("cais/mmlu", "anatomy") if "mmlu" in name else ("openai/gsm8k", "main")
    with pytest.raises(UserError, match=rf"its data for {path} cannot be read: .*Fetch the files again"):
        LocalData(tmp_path).load(path, part)


def score(task, rows, shots, within="", pool=0):
    return TaskScore(task, "acc", "", 0.5, True, shots, within, None, None, [""] * rows, pool)


def test_what_differs_from_published_settings_is_said():
    assert differences([score("humaneval", 164, 0)], chat=False) == []
    assert differences([score("my-task", 3, 1)], chat=True) == []
    said = differences([score("gsm8k", 200, 5, pool=101), score("humaneval", 164, 0)], chat=True)
    assert said == [
        "gsm8k: 200 of its 1,319 rows.",
        "gsm8k: examples drawn from 101 rows, where the published set has 7,473.",
        "Prompts are in the chat template; published figures of base models mostly are not.",
    ]
    group = [score("mmlu", 14042, None), score("mmlu_anatomy", 135, 0, within="mmlu")]
    assert differences(group, chat=False) == [
        "mmlu: 0 examples in a prompt, where published figures mostly have 5 (--shots 5)."
    ]
