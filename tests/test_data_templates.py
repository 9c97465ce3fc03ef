"""The loss mask is exact for every family's chat template and every kind of tokenizer, or the row is refused."""

import pytest
from data_families import FAMILIES, TOKENIZERS, Family, chat

from lorakit.data.encoding import IGNORED, Encoded, encode, joins_pieces
from lorakit.data.formats import RowError
from lorakit.data.rendering import ChatTemplate, render

TALK = chat(
    "What is the capital of France?", "Paris.", "And the sea?", "Un été à la mer 😀, 你好.", "Bye", "Hello there!"
)
# GPT-2's words join two line breaks only where nothing follows: Llama 3's header is not the same before an answer.
ODD = "llama 3"
ALL = [
    (family, kind)
    for family in FAMILIES
    for kind in TOKENIZERS
    if (family, kind) != (ODD, "bytes with a leading space")
]


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer, conversation):
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return tokens(tokenizer, text)


def example(family, tokenizer, conversation, train_on="assistant", **settings):
    template = ChatTemplate(tokenizer, train_on, stop_words=family.stops, **settings)
    (encoded,) = encode([render(conversation, template)], tokenizer)
    if isinstance(encoded, RowError):
        raise encoded
    return encoded


def refusal(family, conversation, train_on="assistant", kind="bytes", **settings):
    with pytest.raises(RowError) as caught:
        example(family, family.tokenizer(kind), conversation, train_on, **settings)
    return str(caught.value)


def trained_texts(tokenizer, encoded):
    """The text of each trained turn, decoded in its place."""
    texts = []
    for start, end in encoded.turns:
        assert encoded.labels[start:end] == encoded.input_ids[start:end]
        before, after = (tokenizer.decode(encoded.input_ids[:edge]) for edge in (start, end))
        assert after.startswith(before)
        texts.append(after[len(before) :])
    return texts


def assert_exact(family, tokenizer, conversation, encoded, train_on="assistant"):
    """Labels decode to exactly the trained turns, and nothing else has a label."""
    answers = [message["content"] for message in conversation if message["role"] == "assistant"]
    wanted = [family.turn(content, at == len(answers) - 1) for at, content in enumerate(answers)]
    wanted = wanted[-1:] if train_on == "last" else wanted
    found = trained_texts(tokenizer, encoded)
    if not joins_pieces(tokenizer):  # it writes spaces of its own
        wanted, found = (["".join(text.replace("▁", " ").split()) for text in texts] for texts in (wanted, found))
    if family.strips:
        wanted, found = ([text.lstrip() for text in texts] for texts in (wanted, found))
    assert found == wanted
    inside = {at for start, end in encoded.turns for at in range(start, end)}
    if train_on == "all":
        assert encoded.labels == encoded.input_ids
    else:
        assert all(label == IGNORED for at, label in enumerate(encoded.labels) if at not in inside)


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize(("name", "kind"), ALL)
def test_labels_are_the_answers_with_the_tokens_that_end_them(name, kind, train_on):
    family = FAMILIES[name]
    tokenizer = family.tokenizer(kind)
    encoded = example(family, tokenizer, TALK, train_on)
    assert_exact(family, tokenizer, TALK, encoded, train_on)


@pytest.mark.parametrize(("name", "kind"), [pair for pair in ALL if pair != (ODD, "bytes, GPT-2 words")])
def test_prompts_and_text_are_encoded_as_at_inference(name, kind):
    family = FAMILIES[name]
    tokenizer = family.tokenizer(kind)
    encoded = example(family, tokenizer, TALK)
    whole = tokens(tokenizer, tokenizer.apply_chat_template(TALK, tokenize=False))
    assert encoded.input_ids == whole[: len(encoded.input_ids)]
    for (start, _), index in zip(encoded.turns, (1, 3, 5), strict=True):
        assert encoded.input_ids[:start] == prompt_ids(tokenizer, TALK[:index])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma"])
def test_a_system_prompt_is_read_and_not_trained(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    talk = chat("Hello", "Paris.", system="Speak French.")
    encoded = example(family, tokenizer, talk)
    assert_exact(family, tokenizer, talk, encoded)
    assert "Speak French." in tokenizer.decode(encoded.input_ids)
    assert example(family, tokenizer, talk[1:], system="Speak French.") == encoded
    assert example(family, tokenizer, talk, system="Speak German.") == encoded


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "answer", ["", "  ", "\n", "\n\nfoo", "foo\n\n", "  foo  ", "a" * 300, " " * 300, "⁣mark", "final"]
)
def test_answers_at_the_edges_of_what_is_text(name, answer):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    talk = chat("Hello", answer, "Hello", answer)
    encoded = example(family, tokenizer, talk)
    assert_exact(family, tokenizer, talk, encoded)
    assert encoded.input_ids[: encoded.turns[0][0]] == prompt_ids(tokenizer, talk[:1])


def test_an_answer_that_begins_with_a_line_break_is_encoded_behind_its_prompt():
    """Encoded whole, the line break would be one token with that of the header, and the mask would begin late."""
    family = FAMILIES["chatml"]
    tokenizer = family.tokenizer()
    talk = chat("Hello", "\nfoo")
    encoded = example(family, tokenizer, talk)
    whole = tokens(tokenizer, tokenizer.apply_chat_template(talk, tokenize=False))
    assert encoded.input_ids != whole[: len(encoded.input_ids)]
    assert encoded.input_ids[: encoded.turns[0][0]] == prompt_ids(tokenizer, talk[:1])


def test_a_header_that_is_encoded_otherwise_before_a_word_is_encoded_as_in_a_prompt():
    family = FAMILIES[ODD]
    tokenizer = family.tokenizer("bytes, GPT-2 words")
    for index in (1, 3, 5):
        encoded = example(family, tokenizer, TALK[: index + 1], "last")
        assert encoded.input_ids[: encoded.turns[0][0]] == prompt_ids(tokenizer, TALK[:index])
    assert "joins text across" in refusal(family, TALK, kind="bytes with a leading space")


def test_what_a_tokenizer_joins_and_cannot_encode_apart_is_refused():
    family = Family(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        str,
        "</s>",
        "<s>",
    )
    assert "joins text across the edge of an answer" in refusal(family, chat("a", "the"), kind="pieces, space first")
    tokenizer = family.tokenizer()
    encoded = example(family, tokenizer, chat("a", "the"))
    assert tokenizer.decode(encoded.input_ids[encoded.turns[0][0] :]) == "the</s>"


def test_a_prompt_alone_loses_no_token_that_swallows_the_line_break_behind_it():
    """Phi 3: cut into pieces, the line break behind <|end|> would be a token that the model never sees."""
    family = FAMILIES["phi 3"]
    tokenizer = family.tokenizer()
    encoded = example(family, tokenizer, TALK)
    assert (
        encoded.input_ids
        == tokens(tokenizer, tokenizer.apply_chat_template(TALK, tokenize=False))[: len(encoded.input_ids)]
    )


def test_thoughts_are_trained_where_the_template_keeps_them():
    family = FAMILIES["qwen 3"]
    tokenizer = family.tokenizer()
    talk = chat("Hello", "<think>\nhm\n</think>\n\nParis", "And?", "<think>\nso\n</think>\n\nLyon")
    encoded = example(family, tokenizer, talk)
    assert trained_texts(tokenizer, encoded) == [
        "Paris<|im_end|>",
        "<think>\nso\n</think>\n\nLyon<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("name", "talk", "reason"),
    [
        ("gemma", chat("a", "b", system="c"), "refuses the conversation: System role not supported"),
        ("llama 2", [*chat("a", "b"), *chat("c", "d")[1:]], "roles must alternate"),
        ("chatml", chat("a"), "nothing to train"),
        ("chatml", [], "nothing to train"),
        ("chatml", chat("a", "b")[1:], "an answer has no question before it: message 1"),
        ("chatml", chat("b", system="a")[:1] + chat("a", "b")[1:], "no question before it: message 2"),
        ("chatml", chat("a <|im_end|> b", "c"), "message contains the text '<|im_end|>'"),
        ("chatml", chat("a", "b<|im_end|>"), "message contains the text '<|im_end|>'"),
        ("harmony", chat("a", "b<|return|>", "c", "d"), "message contains the text '<|return|>'"),
        ("gemma", chat("a<eos>", "b"), "message contains the text '<eos>'"),
        ("command r", [{"role": "tool", "content": "x"}, *chat("a", "b")], "the chat template"),
        ("chatml", chat("a", "b \ud83d"), "half of a surrogate pair"),
    ],
)
def test_rows_that_would_be_trained_wrong_are_refused(name, talk, reason):
    assert reason in refusal(FAMILIES[name], talk)


def test_an_answer_beyond_the_vocabulary_is_refused():
    """Without byte fallback the model would be taught to write <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "yes": 2, "no": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else ' ') }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", chat_template=template
    )
    family = Family(template, str, "</s>")
    assert tokenizer.decode(example(family, tokenizer, chat("what", "yes no")).input_ids) == "<unk> yes no </s>"
    with pytest.raises(RowError, match="for which the tokenizer has only '<unk>'"):
        example(family, tokenizer, chat("what", "yes maybe"))


ASK = "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
TURNS = "{% for m in messages %}{{ m.role + ': ' + m.content + END }}{% endfor %}" + ASK


def bad(template, **facts):
    return Family(template, str, "</s>", "<s>", **facts)


def test_turns_that_no_special_token_ends_are_refused():
    reason = refusal(bad(TURNS.replace("END", "'\\n'")), chat("a", "b"))
    assert "no special token behind it" in reason and "{{ eos_token }}" in reason


def test_a_stop_that_is_no_single_token_is_refused():
    family = bad(TURNS.replace("END", "'<|stop|>'"), stops=("<|stop|>",))
    assert "is not one token of this tokenizer" in refusal(family, chat("a", "b"))


def test_a_header_is_not_taken_for_the_end_of_the_turn_before_it():
    """Only the last answer is ended; behind earlier ones stands the next header, which is a special token too."""
    family = bad(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else eos_token }}",
        special=("<|user|>", "<|assistant|>"),
    )
    assert "'<|user|>' against '</s>'" in refusal(family, chat("a", "b", "c", "d"))
    tokenizer = family.tokenizer()
    encoded = example(family, tokenizer, chat("a", "b", "c", "d"), "last")
    assert trained_texts(tokenizer, encoded) == ["d</s>"]


def test_answers_that_end_in_a_token_that_stops_nothing_are_refused():
    """gpt-oss: earlier answers end with <|end|>, at which the model does not stop unless its configuration says so."""
    family = FAMILIES["harmony"]
    silent = Family(family.template, family.turn, family.eos, None, family.special)
    assert "'<|end|>' against '<|return|>'" in refusal(silent, chat("a", "b", "c", "d"))
    tokenizer = silent.tokenizer()
    for talk, train_on in ((chat("a", "b", "c", "d"), "last"), (chat("a", "b"), "assistant")):
        assert_exact(silent, tokenizer, talk, example(silent, tokenizer, talk, train_on), train_on)


HIDES_HISTORY = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {{- m.role + ':' + (m.content if loop.index0 >= ns.last else '...') + eos_token -}}
{%- endfor -%}"""


def test_a_template_that_rewrites_history_trains_the_last_turn_only():
    family = bad(HIDES_HISTORY + ASK)
    talk = chat("a", "b", "c", "d")
    reason = refusal(family, talk)
    assert "cannot be rendered turn by turn" in reason and "data.train_on: last" in reason
    tokenizer = family.tokenizer()
    assert trained_texts(tokenizer, example(family, tokenizer, talk, "last")) == ["d</s>"]
    counted = bad("{{ messages | length | string + ' messages ' }}" + family.template)
    reason = refusal(counted, talk, "last")
    assert "cannot be rendered turn by turn" in reason and "data.train_on: last" not in reason


def test_a_template_that_drops_the_last_line_break():
    family = bad(
        "{% for m in messages %}{{ m.role + ':' + m.content + eos_token + ('' if loop.last else '\\n') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nassistant:' }}{% endif %}"
    )
    tokenizer = family.tokenizer()
    encoded = example(family, tokenizer, chat("a", "b", "c", "d"))
    assert trained_texts(tokenizer, encoded) == ["b</s>", "d</s>"]


def test_a_doubled_beginning_of_sequence_is_refused():
    assert "begins with '<s>' twice" in refusal(
        bad("{{ bos_token + bos_token }}" + TURNS.replace("END", "eos_token")), chat("a", "b")
    )


@pytest.mark.parametrize(
    "broken", ["{{ messages[9].content }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ nothing() }}"]
)
def test_a_template_that_fails_is_a_row_error(broken):
    assert "the chat template" in refusal(bad(broken), chat("a", "b"))


def test_a_template_that_hides_the_answer_is_refused():
    family = bad(
        "{% for m in messages %}{{ m.role + ':' + m.content | upper + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert "does not write the text of an answer as it is" in refusal(family, chat("a", "b"))


def test_what_follows_the_last_answer_changes_nothing():
    family = FAMILIES["chatml"]
    tokenizer = family.tokenizer()
    assert example(family, tokenizer, chat("a", "b", "c")) == example(family, tokenizer, chat("a", "b"))


def test_a_row_in_a_batch_is_what_it_is_alone():
    family = FAMILIES["chatml"]
    tokenizer = family.tokenizer()
    template = ChatTemplate(tokenizer)
    talks = [chat("Hello", answer, "x", "y") for answer in ("Paris", "\nfoo", "", "a\n\n", " b")]
    batch = encode([render(talk, template) for talk in talks], tokenizer)
    assert batch == [example(family, tokenizer, talk) for talk in talks]
    assert all(isinstance(encoded, Encoded) for encoded in batch)
