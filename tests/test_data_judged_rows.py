"""Rows that say what should not be said are never trained: refused with what they are, and a remedy that works."""

import json
import re

import pytest
import yaml
from conftest import write_rows
from data_families import FAMILIES, answer, chat

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.examples import examples_of
from lorakit.errors import UserError
from lorakit.progress import Silent
from lorakit.recipe.schema import Data

TEMPLATE = ChatTemplate(FAMILIES["chatml"].tokenizer())
GOOD, BAD = "Paris, of course.", "London, or so."
PAIRS = {
    "prompt and texts": {"prompt": "Which?", "chosen": GOOD, "rejected": BAD},
    "prompt and messages": {"prompt": chat("Which?"), "chosen": [answer(GOOD)], "rejected": [answer(BAD)]},
    "prompt and conversations": {
        "prompt": "Which?",
        "chosen": chat("Which?", GOOD),
        "rejected": chat("Which?", BAD),
        "score_chosen": 9.0,
        "score_rejected": 1.0,
    },
    "prompts twice": {
        "prompt": chat("Which?"),
        "chosen": chat("Which?", GOOD),
        "rejected": chat("Which?", BAD),
    },
    "conversations": {"chosen": chat("Which?", GOOD), "rejected": chat("Which?", BAD)},
    "dialogues as text": {
        "chosen": f"Human: Which?\n\nAssistant: {GOOD}",
        "rejected": f"Human: Which?\n\nAssistant: {BAD}",
    },
    "sharegpt": {
        "chosen": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": GOOD}],
        "rejected": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": BAD}],
    },
    "question": {"system": "Be brief.", "question": "Which?", "chosen": GOOD, "rejected": BAD},
    "instruction": {"instruction": "Which?", "input": "", "chosen": GOOD, "rejected": BAD},
    "messages beside": {
        "messages": chat("Which?", GOOD),
        "chosen": chat("Which?", GOOD),
        "rejected": chat("Which?", BAD),
    },
    "other names": {"prompt": "Which?", "chosen_response": GOOD, "rejected_response": BAD},
    "names behind": {"prompt": "Which?", "response_accepted": GOOD, "response_rejected": BAD},
    "capitals": {"prompt": "Which?", "Chosen": GOOD, "Rejected": BAD},
    "joined names": {"prompt": "Which?", "chosenResponse": GOOD, "rejectedResponse": BAD},
    "reject": {"prompt": "Which?", "chosen": GOOD, "reject": BAD},
    "winner": {"prompt": "Which?", "winner": GOOD, "loser": BAD},
    "non-preferred": {"prompt": "Which?", "preferred_output": GOOD, "non_preferred_output": BAD},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(folder, rows, **settings):
    data = Data(train=str(write_rows(folder / "a.jsonl", rows)), **settings)
    train, _ = examples_of(data, TEMPLATE, Silent())
    return train, [TEMPLATE.tokenizer.decode(row["input_ids"]) for row in train.rows]


def refused(folder, rows, **settings):
    with pytest.raises(UserError) as caught:
        trained(folder, rows, **settings)
    return str(caught.value)


@pytest.mark.parametrize("name", PAIRS)
def test_preference_pairs_are_refused_and_the_remedy_trains_the_chosen_side(folder, name):
    rows = [PAIRS[name]] * 2
    reason = refused(folder, rows)
    assert "a.jsonl: these are preference pairs" in reason and "trains on what should be said" in reason
    columns = yaml.safe_load(re.search(r"columns: (\{.*?\})", reason)[1])
    train, texts = trained(folder, rows, columns=columns)
    assert train.report.used == 2 and all(GOOD in text and BAD not in text for text in texts)
    assert all(text.count("Which?") == 1 for text in texts)


@pytest.mark.parametrize("settings", [{"format": "prompt-completion"}, {"columns": {"prompt": "question"}}])
def test_pairs_are_refused_whatever_the_recipe_says_of_format_and_columns(folder, settings):
    rows = [{"prompt": "Which?", "question": "Which?", "completion": BAD, "chosen": GOOD, "rejected": BAD}]
    won = [{"prompt": "Which?", "question": "Which?", "completion": BAD, "winner": GOOD, "loser": BAD}]
    assert "these are preference pairs ('winner' and 'loser'" in refused(folder, won, **settings)
    reason = refused(folder, rows, **settings)
    columns = yaml.safe_load(re.search(r"columns: (\{.*?\})", reason)[1])
    _, texts = trained(folder, rows, **{**settings, "columns": columns})
    assert GOOD in texts[0] and BAD not in texts[0]


@pytest.mark.parametrize("name", ["prompt and texts", "other names"])
def test_the_rejected_side_is_never_taken(folder, name):
    (worse,) = (column for column in PAIRS[name] if column.startswith("rejected"))
    reason = refused(folder, [PAIRS[name]], columns={"completion": worse})
    better = worse.replace("rejected", "chosen")
    assert f"columns: {{completion: {better}}}" in reason and "should not be said" in reason


def test_a_chosen_turn_beside_a_conversation_is_refused(folder):
    row = {
        "conversations": [{"from": "human", "value": "Which?"}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    }
    assert "write the messages before the answer and those of 'chosen' into one column" in refused(folder, [row])
    row = {"input": chat("Which?"), "preferred_output": [answer(GOOD)], "non_preferred_output": [answer(BAD)]}
    assert "and those of 'preferred_output' into one column" in refused(folder, [row])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "response_a": "b", "response_b": "c", "winner": "b"}, "'winner' says which is better"),
        ({"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 1}, "pairs of answers"),
        ({"question": "a", "answers": ["b", "c"], "scores": [0.1, 0.9]}, "these are ranked answers: 'scores'"),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, "these are ranked answers: 'labels'"),
        ({"instruction": "a", "responses": [{"text": "b", "score": 1}]}, "these are ranked answers: 'score'"),
        ({"question": "a", "answers": [{"text": "b", "pm_score": 3, "selected": True}]}, "ranked answers: 'pm_score'"),
        ({"prompt": "a", "completion": "b", "reward": -1.5}, "these are answers with rewards: 'reward'"),
    ],
)
def test_ranks_and_rewards_are_refused(folder, row, reason):
    assert reason in refused(folder, [row])


def test_a_rank_is_a_judgement_where_one_question_has_several_answers(folder):
    row = {"prompt": "a", "completion": "b", "rank": 3}
    assert "these are answers with rewards: 'rank'" in refused(folder, [row, {**row, "completion": "c", "rank": 1}])
    assert trained(folder, [row, {**row, "prompt": "c", "rank": 1}])[0].report.used == 2


def test_a_pair_taken_with_columns_by_its_number_is_refused(folder):
    row = {"prompt": "a", "response_a": "b", "response_b": "c", "winner": "b"}
    for columns in ({}, {"completion": "response_a"}, {"completion": "response_b"}):
        assert "pairs of answers" in refused(folder, [row, {**row, "winner": "a"}], columns=columns)


KTO = [
    {"prompt": "Which?", "completion": GOOD, "label": True},
    {"prompt": "Which?", "completion": BAD, "label": False},
]


@pytest.mark.parametrize(
    "rows",
    [
        KTO,
        [{**row, "label": str(row["label"])} for row in KTO],
        [
            {"prompt": chat(row["prompt"]), "completion": [answer(row["completion"])], "label": row["label"]}
            for row in KTO
        ],
        [{"messages": chat(row["prompt"], row["completion"]), "label": row["label"]} for row in KTO],
        [{"instruction": row["prompt"], "output": row["completion"], "kto_tag": row["label"]} for row in KTO],
        [{"question": row["prompt"], "answer": row["completion"], "is_correct": int(row["label"])} for row in KTO],
        [{"prompt": row["prompt"], "completion": row["completion"], "rejected": not row["label"]} for row in KTO],
        [{"prompt": row["prompt"], "completion": row["completion"], "Label": row["label"]} for row in KTO],
        [{"prompt": row["prompt"], "completion": row["completion"], "isCorrect": row["label"]} for row in KTO],
        [{**row, "label": "desirable" if row["label"] else "undesirable"} for row in KTO],
        [{**row, "label": "chosen" if row["label"] else "Rejected"} for row in KTO],
        [
            {"prompt": row["prompt"], "completion": row["completion"], "good": ["no", "yes"][row["label"]]}
            for row in KTO
        ],
        [
            {
                "prompt": row["prompt"],
                "completion": row["completion"],
                "feedback": "thumbs_" + ("up" if row["label"] else "down"),
            }
            for row in KTO
        ],
        [{"prompt": row["prompt"], "completion": row["completion"], "weight": float(row["label"])} for row in KTO],
    ],
)
def test_rows_with_a_flag_against_them_are_refused_and_never_trained(folder, rows):
    reason = refused(folder, rows)
    assert "a.jsonl:2" in reason and "says that this answer should not be given, as in data for KTO" in reason
    train, texts = trained(folder, rows, broken="drop")
    assert len(texts) == 1 and GOOD in texts[0] and "should not be given" in str(train.report.dropped)


def test_flags_are_read_wherever_they_stand(folder):
    rows = [{"prompt": f"Which {n}?", "completion": GOOD} for n in range(1010)]
    assert "a.jsonl:1011" in refused(folder, [*rows, KTO[1]])
    assert "some rows are preference pairs" in refused(folder, [*rows, {**rows[0], "chosen": GOOD, "rejected": BAD}])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "label": 0},  # a class, as it comes with classification data
        {"prompt": "a", "completion": "b", "label": "spam"},
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "b", "score": 0.2},
        {"prompt": "a", "completion": "b", "weight": 0.5},
        {"question": "a", "answer": "b", "correct": "B"},
        {"question": "a", "answers": {"text": ["b", "c"], "answer_start": [1, 2]}},
        {"text": "a", "score": 0.1, "rejected_reason": None},
        {"text": "a", "label": "b"},
        {"text": "a", "reward": 0.5, "rank": 3},
        {"question": "a", "answer": "A", "answer_a": "b", "answer_b": "c", "label": 0},  # multiple choice
        {"messages": chat("a", "b"), "candidates": ["b", "c"], "scores": [1, 0]},
        {"prompt": "a", "completion": "b", "sentence_1": "x", "sentence_2": "y", "label": "neutral"},
        {"prompt": "a", "completion": "b", "positive": "x", "negative": "y"},
        {"prompt": "a", "completion": "b", "winner": "Bonn", "loser": "Ulm"},  # of a match
        {"prompt": "a", "completion": "b", "accepted": "2026-01-02", "rejected": "2026-01-03"},  # of an application
        {"prompt": "a", "completion": "b", "label": "no"},
        {"prompt": "a", "completion": "b", "feedback": "I liked the second one."},
    ],
)
def test_other_columns_are_no_judgement(folder, row):
    assert trained(folder, [row])[0].report.used == 1


def test_every_command_refuses_them(recipe_file, lorakit, folder):
    write_rows(folder / "pairs.jsonl", [PAIRS["prompt and texts"]])
    path = recipe_file(data={"train": "pairs.jsonl", "eval": ...})
    for command in ("plan", "data", "train"):
        code, _, err = lorakit(command, path)
        assert code == 2 and "columns: {completion: chosen}" in err, command
    assert json.loads((folder / "pairs.jsonl").read_text()) == PAIRS["prompt and texts"]
