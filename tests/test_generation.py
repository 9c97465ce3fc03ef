"""Batches of answers that shrink as rows end: the same answers as of each prompt alone, in every family."""

import pytest
import torch
from model_families import FAMILIES
from transformers import AutoModelForCausalLM

from lorakit.model import generation
from lorakit.model.generation import greedy_answers
from lorakit.progress import Silent

PROMPTS = [[*range(5, 5 + 2 * (number % 4) + 2), 40 + number] for number in range(16)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_batch_that_shrinks_gives_the_answers_of_each_prompt_alone(family, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config).eval()
    monkeypatch.setattr(generation, "_WORTHWHILE_TOKENS", 1)
    monkeypatch.setattr(generation, "_LIVE", 0.9)
    whole = [greedy_answers(model, [prompt], [], 24, 0, "", Silent())[0].tokens for prompt in PROMPTS]
    said = [token for answer in whole for token in answer[3:12]]
    stops = sorted(set(said), key=said.count)[-2:]
    sizes, generates = [], model.generate

    def counted(**given):
        sizes.append(len(given["input_ids"]))
        return generates(**given)

    monkeypatch.setattr(model, "generate", counted)
    answers = greedy_answers(model, PROMPTS, stops, 24, 0, "", Silent())
    for tokens, answer in zip(whole, answers, strict=True):
        ends = next((at for at, token in enumerate(tokens) if token in stops), len(tokens))
        assert answer.tokens == tokens[:ends] and answer.ended == (ends < len(tokens))
    assert len(sizes) > 1
