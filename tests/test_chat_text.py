"""The text of an answer while its tokens come."""

from dataclasses import replace

import pytest
from data_families import chat
from real_templates import NAMES, stop_words, tokenizer_of

from lorakit.chat.answer_text import AnswerText, token_texts
from lorakit.data.answers import decode_answer
from lorakit.data.chat_template import ChatTemplate

ANSWER = "Grüße 🎉 from 東京:\n\n  1. <b>ok</b>"


def stream(template, prompt, tokens, ended=True):
    """The thought and the answer as they are given out piece by piece, and the pieces."""
    text = AnswerText(template, prompt)
    pieces = [text.new_pieces(tokens[:count]) for count in range(1, len(tokens) + 1)]
    pieces.append(text.rest(tokens, ended))
    return "".join(one.thought for one in pieces), "".join(one.answer for one in pieces), pieces


def test_no_character_comes_in_halves(tokenizer):
    template = ChatTemplate(tokenizer)
    tokens = tokenizer(ANSWER)["input_ids"]
    thought, answer, pieces = stream(template, template.write(chat("Hi"), ask=True), tokens)
    assert (thought, answer) == ("", ANSWER)
    assert len(tokens) > len(ANSWER) and not any("\ufffd" in one.answer for one in pieces)


def test_half_a_character_at_the_end_is_given_out_at_last(tokenizer):
    template = ChatTemplate(tokenizer)
    tokens = tokenizer("a🎉")["input_ids"][:-1]
    _, answer, pieces = stream(template, template.write(chat("Hi"), ask=True), tokens)
    assert answer == "a\ufffd" and pieces[-1].answer == "\ufffd"


@pytest.mark.parametrize("name", NAMES)
def test_every_published_template_streams_what_eval_scores(name):
    tokenizer = tokenizer_of(name)
    template = ChatTemplate(tokenizer, stop_words=stop_words(name))
    plain = replace(template, variables=template.without_thoughts)
    prompt = template.write(chat("Hi"), ask=True)
    here = template.thoughts.after_prompt(prompt) if template.thoughts else None
    cases = [(plain, plain.write(chat("Hi"), ask=True), plain.frame[0] + ANSWER, "")]
    if here and not here.skips:
        cases.append((template, prompt, here.add("First, think.", ANSWER), "First, think."))
    for way, asked_by, text, expected in cases:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        thought, answer, _ = stream(way, asked_by, tokens)
        assert answer == decode_answer(tokens, tokenizer).lstrip() == ANSWER
        assert thought.strip() == expected


def test_a_thought_that_is_broken_off_is_no_answer():
    tokenizer = tokenizer_of("qwen3")
    template = ChatTemplate(tokenizer)
    prompt = template.write(chat("Hi"), ask=True)
    tokens = tokenizer("<think>\nFirst, th", add_special_tokens=False)["input_ids"]
    assert stream(template, prompt, tokens, ended=False)[:2] == ("First, th", "")
    answer = decode_answer(tokens, tokenizer)
    assert stream(template, prompt, tokens)[1] == answer and "First, th" in answer


@pytest.mark.parametrize("name", NAMES)
def test_the_texts_of_tokens_are_the_prompt(name):
    tokenizer = tokenizer_of(name)
    template = ChatTemplate(tokenizer)
    prompt = template.write(chat("Hi 🎉", "Paris.", "Und wo?"), ask=True)
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokens, tokenizer)
    assert "".join(one.text for one in texts) == tokenizer.decode(tokens)
    assert sum(one.tokens for one in texts) == len(tokens)
    assert any(one.special for one in texts) or not set(tokens) & set(tokenizer.all_special_ids)
