"""Batches of answers that shrink as rows end, of prompts computed together or one at a time: the same answers as of
each prompt alone, in every family."""

import pytest
import torch
from model_families import FAMILIES
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from lorakit.model import generation
from lorakit.model.generation import greedy_answers
from lorakit.model.kv_cache import RoomyLayer, StackedRows
from lorakit.progress import Silent

PROMPTS = [[*range(5, 5 + 2 * (number % 4) + 2), 40 + number] for number in range(16)]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_batch_that_shrinks_gives_the_answers_of_each_prompt_alone(family, alone, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config).eval()
    monkeypatch.setattr(generation, "_WORTHWHILE_TOKENS", 1)
    whole = [greedy_answers(model, [prompt], [], 24, 0, "", Silent())[0].tokens for prompt in PROMPTS]
    said = [token for answer in whole for token in answer[3:12]]
    stops = sorted(set(said), key=said.count)[-2:]
    if alone:  # with starts in common, and rows left that go on beside those of another batch
        for name, value in (("_ALONE", 1), ("_SHARED", 0.1), ("_PROMPTS_ON_CPU", 12), ("_FEW", 0.5)):
            monkeypatch.setattr(generation, name, value)
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


def test_a_few_prompts_that_begin_alike_come_into_one_batch_and_many_by_their_lengths():
    def prompt(example, length):
        return [*range(10), *[example] * 20, *range(1000 + example, 1000 + example + length - 30)]

    lengths = {(1, 100): 140, (2, 90): 90, (1, 140): 140, (3, 64): 200, (1, 101): 140, (3, 200): 200, (4, 40): 40}
    prompts = [[*prompt(example, length)[:-1], 7] for example, length in lengths]
    assert generation._widths(prompts) == dict(enumerate(lengths.values()))
    assert list(generation._widths(prompts)) == [0, 4, 2, 1, 3, 5, 6]
    many = [prompt(5, length) for length in range(70, 80)]
    assert generation._widths([*many, *prompts]) == dict(enumerate([*range(70, 80), *lengths.values()]))
    assert generation._widths([]) == {}


@pytest.mark.parametrize("alone", [1, 1 << 30])
def test_answers_that_end_at_once_have_no_tokens(alone, monkeypatch):
    torch.manual_seed(0)
    tiny_model = AutoModelForCausalLM.from_config(FAMILIES["llama"].config).eval()
    monkeypatch.setattr(generation, "_ALONE", alone)
    first = {greedy_answers(tiny_model, [prompt], [], 1, 0, "", Silent())[0].tokens[0] for prompt in PROMPTS}
    answers = greedy_answers(tiny_model, PROMPTS, sorted(first), 8, 0, "", Silent())
    assert all(answer.tokens == () and answer.ended for answer in answers)


def test_a_layer_with_room_holds_what_transformers_own_one_holds():
    torch.manual_seed(0)
    roomy, plain = RoomyLayer(), DynamicLayer()
    chosen = {60: [2, 0, 1, 1], 65: [2, 0], 80: [0, 1, 1, 0], 100: [0, 3, 2], 101: [2, 1], 120: [0]}
    for step in range(150):
        rows = 4 if plain.get_seq_length() == 0 else len(plain.keys)
        keys, values = torch.randn(2, rows, 3, 7 if step == 40 else 1, 5)
        for one, other in zip(roomy.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(one, other)
        for layer in (roomy, plain) if step in chosen else ():
            layer.batch_select_indices(torch.tensor(chosen[step]))
        if step == 90:
            for layer in (roomy, plain):
                layer.crop(-11)
    assert roomy.get_seq_length() == plain.get_seq_length()


def test_rows_that_come_one_after_another_are_a_batch_padded_with_zeros_on_the_left():
    torch.manual_seed(0)
    lengths, rows = [5, 3, 7], StackedRows(most=5, longest=9)
    states = [torch.randn(2, 2, 1, 3, length, 4) for length in lengths]  # of keys and values, by layer
    for of_row in states:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(of_row.unbind(1)):
            cache.update(keys, values, layer)
        rows.add(cache)
        assert torch.equal(cache.layers[0].keys, of_row[0, 0])
    whole = rows.whole()
    assert whole.get_seq_length() == 7
    new = torch.randn(2, 3, 3, 80, 4)  # more than there is room for
    padded = torch.cat([pad(of_row, (0, 0, 7 - of_row.shape[-2], 0)) for of_row in states], dim=2)
    for some in new.split([1, 79], dim=-2):
        padded = torch.cat([padded, some[:, None].expand(2, 2, *some.shape[1:])], dim=-2)
        for layer, expected in enumerate(padded.unbind(1)):
            assert torch.equal(torch.stack(whole.update(*some, layer)), expected)
