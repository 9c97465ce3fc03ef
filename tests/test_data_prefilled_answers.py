"""An answer whose beginning is given is one turn: the beginning is read, and what goes on with it is trained."""

import json
from dataclasses import replace

import pytest
import real_templates
from conftest import CHATML, some_of, write_rows
from data_families import FAMILIES, TOKENIZERS, answer, call, chat
from data_masks import tokens, trained_texts

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.examples import examples_of
from lorakit.data.formats import parse_record
from lorakit.data.rows import IGNORED, Conversation, Encoded, RowError
from lorakit.data.tokenize import Encoder
from lorakit.progress import Silent
from lorakit.recipe.schema import Data

BEGUN, REST = "The capital is", " Paris, of course."
ROWS = {
    "prompt-completion": {"prompt": chat("Which?", BEGUN), "completion": [answer(REST)]},
    "messages": {"messages": [*chat("Which?"), answer(BEGUN, prefix=True), answer(REST)]},
    "messages, weight": {"messages": [*chat("Which?"), answer(BEGUN, prefix=True, weight=0), answer(REST)]},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Which?"},
            {"from": "gpt", "value": BEGUN, "prefix": True},
            {"from": "gpt", "value": REST},
        ]
    },
}


def encoded(name, row, tokenizer, family=None, train_on="assistant"):
    template = ChatTemplate(tokenizer, train_on, stop_words=family.stops if family else ())
    return Encoder(tokenizer).encode(render(parse_record(name.partition(",")[0], None, row), template))


@pytest.mark.parametrize("name", ROWS)
def test_a_given_beginning_and_what_goes_on_with_it_are_one_turn(name):
    family = FAMILIES["chatml"]
    tokenizer = family.tokenizer()
    (found,) = encoded(name, ROWS[name], tokenizer)
    assert trained_texts(tokenizer, found) == [f"{REST}<|im_end|>"]
    assert tokenizer.decode(found.input_ids).endswith(f"<|im_start|>assistant\n{BEGUN}{REST}<|im_end|>")
    assert all(label == IGNORED for label in found.labels[: found.turns[0][0]])


@pytest.mark.parametrize(("name", "kind"), some_of([(name, kind) for name in FAMILIES for kind in TOKENIZERS], every=3))
def test_what_is_trained_begins_where_the_model_would_go_on(name, kind):
    """In every family: the tokens before it are those of the prompt and of the given beginning by themselves."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer(kind)
    (found,) = encoded("prompt-completion", ROWS["prompt-completion"], tokenizer, family)
    if isinstance(found, RowError):
        assert kind.startswith(("pieces", "bytes with")) and "joins text across the edge" in str(found)
        return
    template = ChatTemplate(tokenizer, stop_words=family.stops)
    (rendered,) = render(parse_record("prompt-completion", None, ROWS["prompt-completion"]), template)
    (span,) = rendered.spans
    read = rendered.text[: span.start]
    assert read.startswith(tokenizer.apply_chat_template(chat("Which?"), tokenize=False, add_generation_prompt=True))
    assert read.endswith(BEGUN) and rendered.text[span.start :].startswith(REST)
    assert found.input_ids[: found.turns[0][0]] == tokens(tokenizer, read)
    (plain,) = render(parse_record("messages", None, {"messages": chat("Which?", BEGUN + REST)}), template)
    assert plain.text == rendered.text  # the same text, of which less is trained


def test_every_published_template_goes_on_with_a_given_beginning():
    for name in real_templates.NAMES:
        tokenizer = real_templates.tokenizer_of(name)
        template = ChatTemplate(tokenizer, stop_words=real_templates.stop_words(name))
        (rendered,) = render(parse_record("prompt-completion", None, ROWS["prompt-completion"]), template)
        (found,) = Encoder(tokenizer).encode([rendered])
        (span,) = rendered.spans
        assert isinstance(found, Encoded), name
        assert rendered.text[: span.start].endswith(BEGUN) and rendered.text[span.start :].startswith(REST), name


def test_the_given_beginning_belongs_to_the_prompt_of_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    tokenizer = FAMILIES["chatml"].tokenizer()
    data = Data(train=str(write_rows(tmp_path / "a.jsonl", [ROWS["prompt-completion"]])))
    train, _ = examples_of(data, ChatTemplate(tokenizer), Silent())
    (row,) = train.rows
    assert tokenizer.decode(row["input_ids"][: row["answer"]]).endswith(f"assistant\n{BEGUN}")
    assert tokenizer.decode(row["input_ids"][row["answer"] :]) == f"{REST}<|im_end|>"


def test_calls_may_end_what_goes_on_with_a_given_beginning():
    family = FAMILIES["qwen 3"]
    tokenizer = family.tokenizer()
    row = {"prompt": chat("Which?", BEGUN), "completion": [answer(" unknown.", tool_calls=[call(city="Rome")])]}
    (found,) = encoded("prompt-completion", row, tokenizer, family)
    (text,) = trained_texts(tokenizer, found)
    assert text.startswith(" unknown.\n<tool_call>") and text.endswith("</tool_call><|im_end|>")


def test_white_space_that_is_given_is_read():
    tokenizer = FAMILIES["chatml"].tokenizer()
    row = {"prompt": chat("Which?", "\n\n"), "completion": [answer("Paris.")]}
    (found,) = encoded("prompt-completion", row, tokenizer)
    assert trained_texts(tokenizer, found) == ["Paris.<|im_end|>"]
    assert tokenizer.decode(found.input_ids[: found.turns[0][0]]).endswith("assistant\n\n\n")


def test_everything_is_trained_where_the_recipe_says_so():
    tokenizer = FAMILIES["chatml"].tokenizer()
    (found,) = encoded("prompt-completion", ROWS["prompt-completion"], tokenizer, train_on="all")
    assert found.labels == found.input_ids


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([*chat("a"), answer("b", train=False), answer("c")], "nothing says whether both are one turn"),
        (
            [*chat("a"), answer("b", weight=0), answer("c")],
            "prefix: true on the first where they are",
        ),
        ([*chat("a"), answer("b", prefix=True)], "no answer follows a message with prefix: true"),
        ([*chat("a"), answer("b", prefix=True), *chat("c", "d")], "no answer follows a message with prefix: true"),
        ([*chat("a"), answer("b", prefix=True, train=True), answer("c")], "given (prefix: true) and trained"),
        ([*chat("a"), answer("b", prefix=True, thinking="x"), answer("c")], "without thinking"),
        ([*chat("a"), answer("b", prefix=True), answer("c", thinking="x")], "without thinking"),
        ([*chat("a"), answer("b", prefix="yes"), answer("c")], "'prefix' is not true or false"),
        ([{"role": "user", "content": "a", "prefix": True}, answer("c")], "parts that would not be trained on"),
    ],
)
def test_a_beginning_that_cannot_be_joined_is_refused(messages, reason):
    with pytest.raises(RowError) as refused:
        parse_record("messages", None, {"messages": messages})
    assert reason in str(refused.value)


def test_answers_that_are_turns_of_their_own_stay_so():
    tokenizer = FAMILIES["chatml"].tokenizer()
    apart = {"messages": [*chat("a"), answer("b", train=False, prefix=False), answer("c")]}
    (found,) = encoded("messages", apart, tokenizer)
    assert "b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>" in tokenizer.decode(found.input_ids)
    (both,) = encoded("messages", {"messages": [*chat("a", "b"), answer("c")]}, tokenizer)
    assert trained_texts(tokenizer, both) == ["b<|im_end|>", "c<|im_end|>"]
    closed = {"prompt": [*chat("a"), answer("b", prefix=False)], "completion": [answer("c")]}
    assert encoded("prompt-completion", closed, tokenizer) == [found]


def test_a_template_that_rewrites_the_beginning_is_refused():
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.chat_template = CHATML.replace("message['content']", "(message['content'] | replace('  ', ' '))")
    row = {"prompt": chat("a", "two  spaces"), "completion": [answer(" more")]}
    with pytest.raises(RowError, match="does not write the given beginning of an answer as it is"):
        encoded("prompt-completion", row, tokenizer)


def test_a_given_thought_is_refused_where_the_prompt_opens_one_itself():
    opening = "{{ '<|im_start|>assistant\n' }}"
    assert opening in CHATML
    source = CHATML.replace(opening, opening + "{{ '<think>\n' }}{# closed by </think> #}")
    template = ChatTemplate(replace(FAMILIES["chatml"], template=source).tokenizer())
    row = [*chat("a"), answer("<think>hm", prefix=True), answer("</think>b")]
    with pytest.raises(RowError, match="has the mark of a thought, which the prompt opens itself"):
        render(Conversation(row), template)


def test_written_rows_keep_the_given_beginning(recipe_file, lorakit, tmp_path):
    write_rows(tmp_path / "given.jsonl", [ROWS["prompt-completion"]])
    code, _, err = lorakit("data", recipe_file(data={"train": "given.jsonl"}), "--write", "again.jsonl")
    assert code == 0, err
    (again,) = map(json.loads, (tmp_path / "again.jsonl").read_text().splitlines())
    tokenizer = FAMILIES["chatml"].tokenizer()
    assert encoded("messages", again, tokenizer) == encoded("prompt-completion", ROWS["prompt-completion"], tokenizer)
    assert isinstance(encoded("messages", again, tokenizer)[0], Encoded)
