"""Whatever a row and a template say, the mask is exact or the row is refused with a reason."""

from functools import lru_cache

import pytest
from data_families import FAMILIES, TOKENIZERS, TOOLS, Family, answer, call, chat, result
from data_masks import assert_exact, examples
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from lorakit.data.rows import RowError

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>", "[INST]", "[/INST]", "<<SYS>>"),
    *("<|eot_id|>", "<end_of_turn>", "<|end|>", "<|user|>", "<|channel|>final<|message|>", "final<|message|>"),
    *("<think>", "</think>", "<think>\n\n</think>\n\n", "<｜Assistant｜>", "assistant", "lorakitmark", "▁", "<unk>"),
    *("<tool_call>\n", "</tool_call>", "<|call|>", "[TOOL_CALLS]", "```", '"}', "weather", "None", "'arguments':"),
]
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "\n\n", "\t", "  \n ", "Paris.", "\nfoo", "foo \n\n", "é", "ا ב", "😀", "\0", "\u0301a"]
    ),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.text(st.sampled_from("ab \n.é😀ש"), max_size=8),
    st.lists(st.sampled_from([*SPECIAL, "a", " ", "\n"]), max_size=3).map("".join),
)
NAMES = st.sampled_from(["weather", "a", "get_time", "naïve"])
VALUES = TEXTS | st.integers(-9, 9) | st.booleans() | st.none() | st.lists(st.integers(0, 9), max_size=2)
CALLS = st.lists(st.builds(lambda name, given: call(name, **given), NAMES, st.dictionaries(NAMES, VALUES, max_size=2)))
TRAIN_ON = st.sampled_from(["assistant", "last", "all"])


@st.composite
def answers(draw, thinking, tools):
    """An answer, or calls with what they give and the answer then."""
    more = {}
    if thinking and draw(st.booleans()):
        more["thinking"] = draw(TEXTS)
    if draw(st.integers(0, 9)) == 0:
        more["train"] = draw(st.booleans())
    if tools and draw(st.booleans()):
        calls = draw(CALLS.filter(bool).filter(lambda calls: len(calls) < 3))
        results = [result(draw(TEXTS)) for _ in calls]
        return [answer(draw(st.just("") | TEXTS), tool_calls=calls, **more), *results, answer(draw(TEXTS))]
    return [answer(draw(TEXTS), **more)]


@st.composite
def talks(draw, thinking=False, tools=False):
    talk = [] if draw(st.booleans()) else [{"role": "system", "content": draw(TEXTS)}]
    for _ in range(draw(st.integers(1, 3))):
        talk += [{"role": "user", "content": draw(TEXTS)}, *draw(answers(thinking, tools))]
    return talk


@lru_cache
def made(name, kind):
    return FAMILIES[name].tokenizer(kind)


def assert_exact_or_refused(family, tokenizer, talk, train_on, tools=None):
    try:
        found = examples(family, tokenizer, talk, train_on, tools)
    except RowError as error:
        assert error.reason
        return False
    assert_exact(family, tokenizer, talk, found, train_on, tools)
    return True


def thoughts_and_calls_are_exact_or_refused(kind, data, name, train_on):
    family = FAMILIES[name]
    talk = data.draw(talks(family.thinking, True))
    assert_exact_or_refused(family, made(name, kind), talk, train_on, data.draw(st.sampled_from([TOOLS, None])))


NAMES_OF_FAMILIES = st.sampled_from(sorted(FAMILIES))
WITH_TOOLS = st.sampled_from([name for name in sorted(FAMILIES) if FAMILIES[name].tools])
AS_EVER = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=25, **AS_EVER)
@given(NAMES_OF_FAMILIES, talks(), TRAIN_ON)
@example("harmony", chat("a", "final", "b", "<|channel|>final"), "assistant")
@example("qwen 3", chat("a", "<", "b", "<think>"), "assistant")
@example("chatml", chat("a", "lorakitmark", "b", "lorakitmarkk"), "assistant")
def test_the_mask_is_exact_or_the_row_refused(kind, name, talk, train_on):
    assert_exact_or_refused(FAMILIES[name], made(name, kind), talk, train_on)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=15, **AS_EVER)
@given(st.data(), WITH_TOOLS, TRAIN_ON)
def test_the_mask_of_thoughts_and_calls_is_exact_or_the_row_refused(kind, data, name, train_on):
    thoughts_and_calls_are_exact_or_refused(kind, data, name, train_on)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=300, **AS_EVER)
@given(NAMES_OF_FAMILIES, talks(), TRAIN_ON)
def test_the_mask_of_many_rows_is_exact_or_the_row_refused(kind, name, talk, train_on):
    assert_exact_or_refused(FAMILIES[name], made(name, kind), talk, train_on)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=200, **AS_EVER)
@given(st.data(), WITH_TOOLS, TRAIN_ON)
def test_the_mask_of_many_thoughts_and_calls_is_exact_or_the_row_refused(kind, data, name, train_on):
    thoughts_and_calls_are_exact_or_refused(kind, data, name, train_on)


HEADERS = ["<|h|>ROLE<|/h|>\n", "<|h|>ROLE<|/h|>", "ROLE: ", "\n\n### ROLE:\n", "<ROLE>", "<|ROLE|>\n", ""]
FILTERS = {
    "": lambda text: text,
    " | trim": str.strip,
    ".lstrip('\\n')": lambda text: text.lstrip("\n"),
    ".rstrip()": str.rstrip,
    ".split('</think>')[-1]": lambda text: text.split("</think>")[-1],
    " | upper": str.upper,
    "[:3]": lambda text: text[:3],
    " | replace('a', '')": lambda text: text.replace("a", ""),
}
ORDINARY = list(FILTERS)[:5]


@st.composite
def templates(draw, ordinary=False):
    """A template of random habits, as a family; with `ordinary` of such alone as let an exact mask be made."""
    header = draw(st.sampled_from(HEADERS))
    before = draw(st.sampled_from(["", "", " ", "<think>\n\n</think>\n\n", "\n"]))
    name = draw(st.sampled_from(ORDINARY if ordinary else list(FILTERS)))
    stop, earlier = draw(st.tuples(*[st.sampled_from(["</s>", "</s>", "<|stop|>"])] * 2))
    between = draw(st.sampled_from(["", "\n", "\n\n", " "]))
    history = draw(st.sampled_from(["m.content", "m.content", "'...'", "m.content.split('</think>')[-1]"]))
    opening = "" if ordinary else draw(st.sampled_from([*[""] * 9, "<think>\n", " ", "\n"]))
    asks = draw(st.integers(0, 9)) > 0
    tail = draw(st.sampled_from(["", "", "", "</s>", "\n", "<|stop|>", "assistant:"]))
    counts = not ordinary and draw(st.integers(0, 9)) == 0
    start = "{{ messages | length }}" if counts else draw(st.sampled_from(["", "{{ bos_token }}"]))

    def literal(text):
        return repr(text) if "ROLE" not in text else repr(text).replace("ROLE", "' + m.role + '")

    template = (
        f"{start}{{%- for m in messages -%}}{{{{- {literal(header)} -}}}}"
        "{%- if m.role != 'assistant' -%}"
        f"{{{{- m.content + {literal(earlier + between)} -}}}}"
        "{%- elif loop.last -%}"
        f"{{{{- {literal(before)} + m.content{name} + {literal(stop + between)} -}}}}"
        "{%- else -%}"
        f"{{{{- {literal(before)} + ({history}){name} + {literal(earlier + between)} -}}}}"
        "{%- endif -%}{%- endfor -%}"
    )
    asked = header.replace("ROLE", "assistant") + opening if asks else ""
    template += f"{{{{- {literal(asked)} if add_generation_prompt else {literal(tail)} -}}}}"

    stops = draw(st.sampled_from([(), (), ("<|stop|>",)]))
    closing = stop + between + tail
    known = [closing.index(word) + len(word) for word in ("</s>", *stops) if word in closing]
    closing = closing[: min(known)] if known else stop

    def turn(message):
        whole = header.replace("ROLE", "assistant") + before + FILTERS[name](message["content"]) + closing
        assume(whole.startswith(asked))
        return whole.removeprefix(asked)

    special = ("<|h|>", "<|/h|>", "<|stop|>", "<|user|>", "<|assistant|>", "<|system|>")
    return Family(template, turn, "</s>", "<s>", special, stops)


@pytest.mark.slow
@settings(max_examples=400, **AS_EVER)
@given(templates(), talks(), TRAIN_ON, st.sampled_from(TOKENIZERS))
def test_the_mask_of_any_template_is_exact_or_the_row_refused(family, talk, train_on, kind):
    assert_exact_or_refused(family, family.tokenizer(kind), talk, train_on)


@pytest.mark.slow
@settings(max_examples=100, **AS_EVER)
@given(templates(ordinary=True), st.sampled_from(["assistant", "last"]))
def test_ordinary_rows_are_not_refused(family, train_on):
    assert assert_exact_or_refused(family, family.tokenizer(), chat("Hello", "Paris", "And", "Lyon"), train_on)
