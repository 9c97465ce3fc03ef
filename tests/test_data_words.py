"""Texts put together from known words have the tokens that they have as a whole."""

import pytest
from data_families import FAMILIES, TOKENIZERS
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from lorakit.data.tokenize import Encoder
from lorakit.data.words import WordCache

PIECES = [
    "a",
    "Bc",
    "12",
    " ",
    "  ",
    "\n",
    "\t",
    "'s",
    ".",
    ",",
    "-",
    "é",
    "你好",
    "😀",
    "\u0301",
    "\xa0",
    "\x1c",
    "\x85",
]
ENCODERS = {kind: Encoder(FAMILIES["chatml"].tokenizer(kind)) for kind in TOKENIZERS}


def words_of(encoder):
    return WordCache(encoder.tokenizer, encoder._tokens)


WORDS = {kind: words_of(encoder) for kind, encoder in ENCODERS.items()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), max_size=8))
def test_tokens_by_words_are_those_of_the_whole(kind, texts):
    encoder = ENCODERS[kind]
    assert WORDS[kind].tokens(texts) == encoder._tokens(texts)


@given(texts=st.lists(st.text(max_size=40), max_size=6))
def test_any_text_has_the_tokens_of_the_whole(texts):
    encoder = ENCODERS["bytes"]
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    assert WORDS["bytes"].tokens(texts) == encoder._tokens(texts)


def test_only_tokenizers_that_cut_before_spaces_are_asked_by_words():
    assert {kind for kind, words in WORDS.items() if words._works} == {"bytes", "bytes, GPT-2 words"}


def test_a_tokenizer_that_keeps_words_together_is_found_out():
    tokenizer = FAMILIES["chatml"].tokenizer("bytes")
    pairs = pre_tokenizers.Split(Regex(r"\S+ \S+|\s+|\S+"), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pairs, whole])
    encoder = Encoder(tokenizer)
    words = words_of(encoder)
    assert not words._works
    assert words.tokens(["What is the"]) == encoder._tokens(["What is the"])


def test_words_that_turn_out_wrong_are_given_up():
    tokenizer = FAMILIES["chatml"].tokenizer("bytes")
    encoder = Encoder(tokenizer)
    words = WordCache(tokenizer, encoder._tokens)
    words._later["there"] = [1, 2, 3]
    assert words._works and words.tokens(["Hello there"]) == encoder._tokens(["Hello there"])
    assert not words._works


def test_added_tokens_with_a_space_inside_are_not_cut():
    tokenizer = FAMILIES["chatml"].tokenizer("bytes")
    tokenizer.add_tokens(["New York"])
    encoder = Encoder(tokenizer)
    words = words_of(encoder)
    assert words.tokens(["1 2", "in New York now"]) == encoder._tokens(["1 2", "in New York now"])
    assert not words._works


@pytest.mark.parametrize("pattern", [r"\p{N}+", r"(?=(\d{3})+(?!\d))", r" ?\p{L}+(?=\s+\p{L})", r"\b\w+\b"])
def test_tokens_that_cross_spaces_and_patterns_that_look_around_are_found_out(pattern):
    tokenizer = FAMILIES["chatml"].tokenizer("bytes")
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, whole])
    encoder = Encoder(tokenizer)
    texts = ["What is the 1 000 000 capital", "1000 a b", "Hello there how"]
    assert words_of(encoder).tokens(texts) == encoder._tokens(texts)
