"""Whatever a row says, its mask is exact or it is refused with a reason."""

from functools import lru_cache

import pytest
from data_families import FAMILIES, TOKENIZERS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_data_templates import assert_exact, prompt_ids

from lorakit.data.encoding import Encoded, encode
from lorakit.data.formats import RowError
from lorakit.data.rendering import ChatTemplate, render

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>", "[INST]", "[/INST]", "<<SYS>>"),
    *("<|eot_id|>", "<end_of_turn>", "<|end|>", "<|user|>", "<|channel|>final<|message|>", "final<|message|>"),
    *("<think>", "</think>", "<think>\n\n</think>\n\n", "<｜Assistant｜>", "assistant", "⁣mark", "⁣", "▁", "<unk>"),
]
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "\n\n", "\t", "  \n ", "Paris.", "\nfoo", "foo \n\n", "é", "ا ב", "😀", "\0", "\u0301a"]
    ),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.text(st.sampled_from("ab \n.é😀ש"), max_size=8),
    st.lists(st.sampled_from([*SPECIAL, "a", " ", "\n"]), max_size=3).map("".join),
)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)


@lru_cache
def made(name, kind):
    return FAMILIES[name].tokenizer(kind)


def talk_of(turns, system):
    start = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return start + [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(FAMILIES)), TURNS, st.none() | TEXTS, st.sampled_from(["assistant", "last", "all"]))
@example("harmony", [("a", "final"), ("b", "<|channel|>final")], None, "assistant")
@example("qwen 3", [("a", "<"), ("b", "<think>")], None, "assistant")
@example("chatml", [("a", "⁣mark"), ("b", "⁣")], None, "assistant")
def test_the_mask_is_exact_or_the_row_refused(kind, name, turns, system, train_on):
    family, tokenizer, talk = FAMILIES[name], made(name, kind), talk_of(turns, system)
    try:
        (encoded,) = encode([render(talk, ChatTemplate(tokenizer, train_on, stop_words=family.stops))], tokenizer)
    except RowError as error:
        encoded = error
    if isinstance(encoded, RowError):
        assert encoded.reason
        return
    assert isinstance(encoded, Encoded)
    assert_exact(family, tokenizer, talk, encoded, train_on)
    stops = {tokenizer.convert_tokens_to_ids(word) for word in (family.eos, *family.stops, *family.special)}
    assert all(encoded.input_ids[end - 1] in stops for _, end in encoded.turns)
    start = 1 if system is None else 2
    index = len(talk) - 1 if train_on == "last" else start
    if len(turns) == 1 or train_on != "last":
        assert encoded.input_ids[: encoded.turns[0][0]] == prompt_ids(tokenizer, talk[:index])
