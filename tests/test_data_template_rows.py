"""Rows of the format `template` on their way: what is trained, errors with their place, tags, the cache."""

import json
from pathlib import Path

import pytest
from data_families import FAMILIES

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.examples import examples_of
from lorakit.data.sources import open_source, sources_of
from lorakit.errors import UserError
from lorakit.evaluate.rendering import MOST_TASKS, RenderedRows
from lorakit.evaluate.run import _masks
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.recipe.schema import Data

TEMPLATE = {"user": "Context: {kb text}\nQ: {q}", "assistant": "{a}"}
ROWS = [
    {"kb text": f"k{n} {{q}}", "q": f"say {n}", "a": {"n": n}, "task": "even" if n % 2 else "odd"} for n in range(6)
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def examples(rows, data=None, **settings):
    train = write("rows.jsonl", rows)
    made = Data.model_validate({"train": f"{Path.cwd()}/{train}", "format": {"template": settings}, **(data or {})})
    return examples_of(made, ChatTemplate(FAMILIES["chatml"].tokenizer()), Silent())[0]


def opened(path, template=None, **data):
    settings = {"format": {"template": {**TEMPLATE, **(template or {})}}, **data}
    made = Data.model_validate({"train": str(Path(path).absolute()), **settings})
    return open_source(sources_of(made, made.train)[0])


def test_a_template_trains_the_tokens_of_the_same_messages():
    few = [{"user": "{{hi}}", "assistant": "ho"}]
    made = examples(ROWS, system="S", examples=few, **TEMPLATE)
    messages = [
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "{hi}"},
            {"role": "assistant", "content": "ho", "train": False},
            {"role": "user", "content": f"Context: {row['kb text']}\nQ: {row['q']}"},
            {"role": "assistant", "content": json.dumps(row["a"])},
        ]
        for row in ROWS
    ]
    by_hand = examples([{"messages": one} for one in messages], {"format": "messages"})
    assert (
        made.rows.select_columns(["input_ids", "labels"]).to_list()
        == by_hand.rows.select_columns(["input_ids", "labels"]).to_list()
    )
    assert made.tokens_sha256() == by_hand.tokens_sha256()


def test_fixed_examples_make_no_rows_alike_and_move_no_row_over_the_split():
    rows = [{"q": f"How heavy may parcel {n} be at most today?", "a": f"It may weigh {n} kg."} for n in range(15)]
    long = [{"user": " ".join(f"word{n}" for n in range(120)), "assistant": "fine"}]
    turns = {"user": "{q}", "assistant": "{a}"}
    split = {"eval": 0.3, "clean": {"near_duplicates": "fix"}}
    plain, made = examples(rows, split, **turns), examples(rows, split, examples=long, **turns)
    assert list(made.rows["where"]) == list(plain.rows["where"]) and 0 < made.report.used < 15


def test_a_csv_file_with_odd_columns_is_read_and_empty_cells_are_missing():
    Path("odd.csv").write_text("kb text,q,a,größe.cm\n,x,y,3\nk,x,z,4\n", encoding="utf-8")
    source = opened("odd.csv", {"user": "{kb text}/{größe.cm}", "missing": {"kb text": "none"}})
    rows = [source.parse(row.record).messages[0]["content"] for block in source.blocks for row in block.rows()]
    assert rows == ["none/3", "k/4"]
    assert source.why == "as the recipe says; not used: 'q'"


def test_a_column_that_no_row_has_is_an_error_at_once():
    write("rows.jsonl", ROWS)
    with pytest.raises(UserError, match=r"names the column 'kb_text', which no row has. Did you mean \{kb text\}\?"):
        opened("rows.jsonl", {"user": "{kb_text}"})
    with pytest.raises(UserError, match=r"names the column 'kb_text', which no row has. Did you mean \{kb text\}\?"):
        opened("rows.jsonl", {"user": "{kb_text}{q}", "missing": {"kb_text": ""}})
    assert "; no row has 'hint'" in opened("rows.jsonl", {"user": "{hint}{q}", "missing": {"hint": ""}}).why
    with pytest.raises(UserError, match=r"names the column 'tasks', which no row has. Did you mean \{task\}\?"):
        opened("rows.jsonl", {"user": {"jinja_text": "{{ tasks }}"}})
    with pytest.raises(UserError, match="names the column 'subject', which no row has"):
        opened(
            write("c.jsonl", [{"text": "t", "label": "l"}]), format={"classification": {"prompt": "{subject} {text}"}}
        )


def test_a_row_without_the_column_is_named_with_its_place():
    with pytest.raises(
        UserError, match=r"rows.jsonl:7: the row has no column 'kb text' \(write missing: .*did you mean"
    ):
        examples([*ROWS, {"kb_text": "x", "q": "x", "a": "y"}], **TEMPLATE)
    made = examples([*ROWS, {"q": "x", "a": "y"}], {"broken": "drop"}, **TEMPLATE)
    assert made.report.used == 6 and made.report.dropped.total == 1


def test_columns_get_our_names_before_they_are_filled_in():
    write("rows.jsonl", ROWS)
    source = opened("rows.jsonl", {"user": "{context} {q}"}, columns={"context": "kb text"})
    assert source.parse(ROWS[0]).messages[0]["content"] == "k0 {q} say 0"
    with pytest.raises(UserError, match=r"data\.columns fills 'contxt', which the format template does not read"):
        opened("rows.jsonl", columns={"contxt": "q2", "q": "q"})


def test_the_side_of_a_pair_that_should_not_be_said_is_no_answer():
    write("pairs.jsonl", [{"q": "x", "chosen": "y", "rejected": "z"}])
    with pytest.raises(UserError, match=r"answers with 'rejected', the side of a preference pair .*write \{chosen\}"):
        opened("pairs.jsonl", {"user": "{q}", "assistant": "{rejected}"})
    assert opened("pairs.jsonl", {"user": "{q}", "assistant": "{chosen}"}).format == "template"


def test_a_changed_jinja_file_makes_other_examples():
    write("rows.jsonl", ROWS)
    text = "model: {base: org/model}\ndata:\n  train: rows.jsonl\n"
    text += "  format: {template: {user: {jinja: p.jinja}, assistant: '{a}'}}\n"
    keys = []
    for prompt in ("Q: {{ q }}", "A: {{ q }}", "Q: {{ q }}"):
        for name, content in {"p.jinja": prompt, "r.yaml": text}.items():
            Path(name).write_text(content, encoding="utf-8")
        data = load(Path("r.yaml")).recipe.data
        keys.append(examples_of(data, ChatTemplate(FAMILIES["chatml"].tokenizer()), Silent())[0].key)
    assert keys[0] == keys[2] != keys[1]


# tags


def test_a_task_of_a_row_is_a_tag_in_every_format():
    made = examples(ROWS, **TEMPLATE)
    assert made.report.tasks == {"odd": 3, "even": 3}
    assert [row["task"] for row in made.rows] == ["odd", "even"] * 3
    assert "not used" not in made.report.sources[0].why
    rows = [
        {"prompt": str(n), "completion": "x" * n, "task": task}
        for n, task in enumerate(["a", None, 3, "b" * 61, ["c"]])
    ]
    other = examples(rows, {"format": "auto"})
    assert other.report.tasks == {"a": 1, "3": 1}
    assert type(other.report).from_dict(other.report.to_dict()) == other.report
    assert examples(ROWS, user="{task}: {q}", assistant="{a}").report.tasks == {"odd": 3, "even": 3}


def test_a_tag_of_a_row_goes_before_that_of_its_source_and_columns_can_name_it():
    rows = [{"prompt": "a", "completion": "b", "kind": "x"}, {"prompt": "c", "completion": "d"}]
    train = {"path": f"{Path.cwd()}/rows.jsonl", "task": "whole", "columns": {"task": "kind"}}
    assert examples(rows, {"format": "auto", "train": [train]}).report.tasks == {"x": 1, "whole": 1}
    long = [{"prompt": "a", "completion": "b", "task": "Write about " + "it " * 30}]
    assert "not used: 'task'" in examples(long, {"format": "auto"}).report.sources[0].why


def test_scores_are_broken_down_by_the_tags_of_rows():
    made = examples(ROWS, **TEMPLATE)
    rendered = RenderedRows(None, (), list(made.rows), made.report.sources)
    assert {name: mask.tolist() for name, mask in _masks(rendered).items()} == {
        "task odd": [True, False] * 3,
        "task even": [False, True] * 3,
    }
    many = [{**row, "task": str(number)} for number, row in enumerate(list(made.rows) * (MOST_TASKS // 6 + 1))]
    assert _masks(RenderedRows(None, (), many, made.report.sources)) == {}
