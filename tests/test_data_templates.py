"""The loss mask is exact for every family's chat template and every kind of tokenizer."""

from dataclasses import replace

import pytest
from conftest import some_of
from data_families import FAMILIES, TOKENIZERS, TOOLS, answer, call, chat, result
from data_masks import assert_exact, example, examples, prompt, refusal, tokens

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.rows import IGNORED, Conversation
from lorakit.data.tokenize import Encoder

TALK = chat(
    "What is the capital of France?", "Paris.", "And the sea?", "Un été à la mer 😀, 你好.", "Bye", "Hello there!"
)
THOUGHTS = [
    chat("Hello")[0],
    answer("Paris.", thinking="hm,\n\nhm"),
    chat("And?")[0],
    answer("Un été.", thinking="so 你好"),
]
CALLS = [
    *chat("How is the weather in Rome?"),
    answer(tool_calls=[call(city="Rome à la mer")]),
    result('{"t": 20}'),
    answer("It is 20 degrees."),
    *chat("And in Oslo?"),
    answer(tool_calls=[call(city="Oslo", days=3, now=True)]),
    result("cold"),
    answer("It is cold."),
]
# GPT-2's words join two line breaks only where nothing follows: such a header is not the same before an answer.
ODD = ("llama 3", "llama 3.1", "qwen 3.5")
ALL = [
    (family, kind)
    for family in FAMILIES
    for kind in TOKENIZERS
    if kind != "bytes with a leading space" or family not in ODD
]
EDGES = ["", "  ", "\n", "\n\nfoo", "foo\n\n", "  foo  ", "a" * 300, " " * 300, "lorakitmark", "final"]
REWRITES = ("qwen 3", "qwen 3.5", "harmony")
FAMILIES_WITH_TOOLS = [name for name, family in FAMILIES.items() if family.tools]


@pytest.mark.parametrize(
    ("name", "kind", "train_on"),
    some_of([(*pair, train_on) for pair in ALL for train_on in ("assistant", "last", "all")], every=4),
)
def test_labels_are_the_answers_with_the_tokens_that_end_them(name, kind, train_on):
    family = FAMILIES[name]
    tokenizer = family.tokenizer(kind)
    if train_on == "all" and name in REWRITES:
        assert "write data.train_on: assistant" in refusal(family, TALK, "all", kind=kind)
        return
    found = examples(family, tokenizer, TALK, train_on)
    assert_exact(family, tokenizer, TALK, found, train_on)
    assert len(found) == (3 if name in REWRITES and train_on != "last" else 1)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in ALL if FAMILIES[name].tools])
def test_calls_are_trained_up_to_the_token_that_ends_them(name, kind):
    family = FAMILIES[name]
    tokenizer = family.tokenizer(kind)
    for train_on in ("assistant", "last"):
        found = examples(family, tokenizer, CALLS, train_on, TOOLS)
        assert_exact(family, tokenizer, CALLS, found, train_on, TOOLS)
        assert all("weather" in tokenizer.decode(encoded.input_ids) for encoded in found)


def test_calls_end_where_the_template_ends_them_whatever_else_stops_the_model():
    """gpt-oss without its generation configuration, which names <|call|>."""
    family = replace(FAMILIES["harmony"], stops=())
    tokenizer = family.tokenizer()
    found = examples(family, tokenizer, CALLS, tools=TOOLS)
    assert_exact(family, tokenizer, CALLS, found, tools=TOOLS)


@pytest.mark.parametrize("name", [name for name in FAMILIES_WITH_TOOLS if name not in ("llama 3.1", "harmony")])
def test_several_calls_are_one_turn(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    talk = [*CALLS[:1], answer(tool_calls=[call(city="Rome"), call("weather", city="Oslo")]), *CALLS[2:4]]
    found = examples(family, tokenizer, talk, tools=TOOLS)
    assert_exact(family, tokenizer, talk, found, tools=TOOLS)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in ALL if FAMILIES[name].thinking])
def test_thoughts_are_trained(name, kind):
    family = FAMILIES[name]
    tokenizer = family.tokenizer(kind)
    found = examples(family, tokenizer, THOUGHTS)
    assert_exact(family, tokenizer, THOUGHTS, found)
    assert len(found) == 2, "each thought is gone from the text of a later answer"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.thinking])
def test_thoughts_before_calls_are_trained_with_the_answer_behind_them(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    talk = [
        *CALLS[:1],
        answer(thinking="I must look.", tool_calls=[call(city="Rome")]),
        *CALLS[2:3],
        answer("It is 20 degrees.", thinking="Now I know."),
    ]
    (encoded,) = examples(family, tokenizer, talk, tools=TOOLS)
    assert_exact(family, tokenizer, talk, [encoded], tools=TOOLS)


def test_thoughts_in_the_text_are_trained_where_the_template_keeps_them():
    family = FAMILIES["qwen 3"]
    tokenizer = family.tokenizer()
    talk = chat("Hello", "<think>\nhm\n</think>\n\nParis", "And?", "<think>\nso\n</think>\n\nLyon")
    assert_exact(family, tokenizer, talk, examples(family, tokenizer, talk))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_prompt_is_read_and_not_trained(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    talk = chat("Hello", "Paris.", system="Speak French.")
    if not family.system:
        for row, settings in ((talk, {}), (talk[1:], {"system": "Speak French."})):
            assert "put it into the first user message" in refusal(family, row, **settings)
        return
    encoded = example(family, tokenizer, talk)
    assert_exact(family, tokenizer, talk, [encoded])
    assert "Speak French." in tokenizer.decode(encoded.input_ids)
    assert example(family, tokenizer, talk[1:], system="Speak French.") == encoded
    assert example(family, tokenizer, talk, system="Speak German.") == encoded


def test_a_system_prompt_that_moves_to_the_last_question_is_read_there():
    """Mistral 3: the text with an answer has no system prompt at all, though the prompt for it has."""
    family = FAMILIES["mistral 3"]
    tokenizer = family.tokenizer()
    talk = chat("Hello", "Paris.", "And?", "Lyon.", system="Speak French.")
    found = examples(family, tokenizer, talk)
    assert_exact(family, tokenizer, talk, found)
    assert [tokenizer.decode(encoded.input_ids).count("Speak French.") for encoded in found] == [1, 1]


@pytest.mark.parametrize(("name", "said"), some_of([(name, said) for said in EDGES for name in FAMILIES], every=3))
def test_answers_at_the_edges_of_what_is_text(name, said):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    talk = chat("Hello", said, "Hello", said)
    assert_exact(family, tokenizer, talk, examples(family, tokenizer, talk))


def test_an_answer_that_begins_with_a_line_break_is_encoded_behind_its_prompt():
    """Encoded whole, the line break would be one token with that of the header, and the mask would begin late."""
    family = FAMILIES["chatml"]
    tokenizer = family.tokenizer()
    talk = chat("Hello", "\nfoo")
    encoded = example(family, tokenizer, talk)
    whole = tokens(tokenizer, tokenizer.apply_chat_template(talk, tokenize=False))
    assert encoded.input_ids != whole[: len(encoded.input_ids)]
    assert_exact(family, tokenizer, talk, [encoded])


def test_a_header_that_is_encoded_otherwise_before_a_word_is_encoded_as_in_a_prompt():
    family = FAMILIES["llama 3"]
    tokenizer = family.tokenizer("bytes, GPT-2 words")
    for index in (1, 3, 5):
        encoded = example(family, tokenizer, TALK[: index + 1], "last")
        assert encoded.input_ids[: encoded.turns[0][0]] == prompt(family, tokenizer, TALK[:index])
    assert "joins text across" in refusal(family, TALK, kind="bytes with a leading space")


def test_a_prompt_alone_loses_no_token_that_swallows_the_line_break_behind_it():
    """Phi 3: cut into pieces, the line break behind <|end|> would be a token that the model never sees."""
    family = FAMILIES["phi 3"]
    tokenizer = family.tokenizer()
    encoded = example(family, tokenizer, TALK)
    whole = tokens(tokenizer, tokenizer.apply_chat_template(TALK, tokenize=False))
    assert encoded.input_ids == whole[: len(encoded.input_ids)]


@pytest.mark.parametrize("talk", [TALK, chat("a", "", "b", " c\n")])
def test_the_mask_is_that_of_generation_marks(talk):
    family = FAMILIES["chatml, generation marks"]
    tokenizer = family.tokenizer()
    marked = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    encoded = example(family, tokenizer, talk)
    mask = [int(label != IGNORED) for label in encoded.labels]
    assert mask == marked["assistant_masks"][: len(mask)] and not any(marked["assistant_masks"][len(mask) :])


@pytest.mark.parametrize("name", ["chatml", "harmony", "qwen 3", "llama 3", "glm 4"])
def test_turns_that_are_not_to_be_trained_are_read_only(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    talk = [message | {"train": index != 3} if index % 2 else message for index, message in enumerate(TALK)]
    found = examples(family, tokenizer, talk)
    assert_exact(family, tokenizer, talk, found)
    assert "Un été" in tokenizer.decode(found[-1].input_ids)
    assert example(family, tokenizer, talk, "last") == example(family, tokenizer, TALK, "last")


def test_what_is_not_to_be_trained_is_left_out_of_everything():
    family = FAMILIES["chatml"]
    tokenizer = family.tokenizer()
    talk = [*TALK[:3], TALK[3] | {"train": False}, TALK[4], TALK[5] | {"train": False}]
    encoded = example(family, tokenizer, talk, "all")
    silent = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label == IGNORED]
    assert tokenizer.decode(silent) == "Un été à la mer 😀, 你好.<|im_end|>Hello there!<|im_end|>"


def test_what_follows_the_last_answer_changes_nothing():
    family = FAMILIES["chatml"]
    tokenizer = family.tokenizer()
    assert example(family, tokenizer, chat("a", "b", "c")) == example(family, tokenizer, chat("a", "b"))


def test_a_row_in_a_batch_is_what_it_is_alone():
    family = FAMILIES["chatml"]
    tokenizer = family.tokenizer()
    template = ChatTemplate(tokenizer)
    talks = [chat("Hello", said, "x", "y") for said in ("Paris", "\nfoo", "", "a\n\n", " b")]
    batch = Encoder(tokenizer).encode([text for talk in talks for text in render(Conversation(talk), template)])
    assert batch == [example(family, tokenizer, talk) for talk in talks]
