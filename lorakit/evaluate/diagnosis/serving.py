"""What a server does otherwise than the training: prompts of other lengths, marks that come out as text, no stop."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import median_low
from typing import Any

import numpy as np

from lorakit.amounts import counted
from lorakit.data.answers import until_stop
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.chat_template.template_probe import compile_alternation
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.diagnosis.style import UNFINISHED
from lorakit.evaluate.metric import wilson
from lorakit.evaluate.models import ModelSet
from lorakit.evaluate.rendering import RenderedRows, row_template
from lorakit.evaluate.served_answers import PROMPT, ServedAnswers

_CASES = 5
_TEMPLATE = (
    "the run's own is adapter/chat_template.jinja (--chat-template-file of llama-server, --chat-template of vLLM and "
    "SGLang; a GGUF file holds it as tokenizer.chat_template)"
)
_BEGINNING = (
    "The tokenizer or the chat template of the server writes it or leaves it out: look at tokenizer.ggml.add_bos_token "
    "of a GGUF file (llama.cpp takes true for SentencePiece if it is missing), add_bos_token in tokenizer_config.json, "
    "and {{ bos_token }} in the template."
)

PROMPT_TOKENS = Finding(
    "prompt tokens",
    unit="share of prompts that have another number of tokens on the server than in the training",
    threshold=0.0,
    why="The server counts the tokens of each prompt (usage.prompt_tokens), and the training's template and tokenizer "
    "make a known number of the same messages. One prompt that differs is enough to be flagged: the model is asked "
    "otherwise than it was trained. Prompts of the same length may still differ in their words.",
    remedy=f"Check the chat template that the server uses, and whether it adds a system prompt: {_TEMPLATE}. A date "
    "that the template writes, and tools, count too.",
)
WRITTEN_MARKS = Finding(
    "marks in answers",
    unit="share of answers that have a stop token or a mark of the chat template in their text",
    threshold=0.0,
    why="Such marks are never part of an answer, and those that stand in the row itself are not counted. One is enough "
    "to be flagged: whoever reads the answer gets it too.",
    remedy="Check that the server's tokenizer has these marks as special tokens, that its stop tokens are those of the "
    f"training, and its chat template: {_TEMPLATE}.",
)


def add_server_findings(
    findings: Sequence[Finding], served: ServedAnswers, rendered: RenderedRows, model_set: ModelSet
) -> list[Finding]:
    """The findings about a server's answers, and those that only a server has."""
    if not served.answers:
        return list(findings)
    template = row_template(rendered.tokenizer, None, model_set.prepared)
    stops = rendered.tokenizer.convert_ids_to_tokens(list(rendered.stop_ids))
    template = replace(template, stop_words=tuple(word for word in stops if word))
    counts = [one.prompt_tokens for one in served.answers]
    own = [_prompt_tokens(counts, rendered), _written_marks(served.texts(rendered.tokenizer), rendered, template)]
    return [*(_unfinished_on_server(one, template) for one in findings), *own]


def _unfinished_on_server(finding: Finding, template: ChatTemplate) -> Finding:
    """The finding about unfinished answers with what to do where a server gives them."""
    if finding.name != UNFINISHED.name:
        return finding
    remedy = (
        "Raise --max-new-tokens to see whether the answers end at all. If they go on, the server does not stop at what "
        f"ends an answer in the training ({', '.join(template.stop_words)}): check its stop tokens (eos_token_id in "
        "generation_config.json, tokenizer.ggml.eos_token_id in a GGUF file) and its chat template: "
        f"{_TEMPLATE}."
    )
    return replace(finding, remedy=remedy)


def _prompt_tokens(counts: Sequence[int | None], rendered: RenderedRows) -> Finding:
    """Whether the server's prompts are as long as the training's."""
    expected = [rendered.rows[at][PROMPT].tokens for at in rendered.with_answer]
    known = [
        (at, count, own) for at, (count, own) in enumerate(zip(counts, expected, strict=True)) if count is not None
    ]
    if not known:
        return PROMPT_TOKENS.unmeasured("the server does not count the tokens of its prompts (usage.prompt_tokens)")
    other = [(at, count, own) for at, count, own in known if count != own]
    details: dict[str, Any] = {"rows": len(known), "different": len(other)}
    if not other:
        return PROMPT_TOKENS.measured(0.0, False, wilson(0, len(known)), details)
    differences = Counter(count - own for _, count, own in other)
    middle = median_low(count - own for _, count, own in other)
    details |= {"median difference": middle, "differences": {str(by): rows for by, rows in differences.most_common()}}
    details["cases"] = [
        {"where": rendered.rows[rendered.with_answer[at]]["where"], "server": count, "training": own}
        for at, count, own in other[:_CASES]
    ]
    _, count, own = other[0]
    more = f"{counted(abs(middle), 'token')} {'more' if middle > 0 else 'fewer'}"
    text = f"prompt tokens: the server's prompts are not the training's: {len(other):,} of {len(known):,} have another "
    text += f"number of tokens, {more} at the median (the first {count:,} instead of {own:,})"
    finding = PROMPT_TOKENS
    if reason := _beginning(differences, len(known), rendered):
        details["beginning of sequence"] = reason
        text, finding = f"{text}, {reason}", replace(finding, remedy=_BEGINNING)
    details["in words"] = text
    share = len(other) / len(known)
    return finding.measured(share, True, wilson(len(other), len(known)), details)


def _beginning(differences: Counter[int], rows: int, rendered: RenderedRows) -> str:
    """In words, that a beginning of sequence alone would make the difference; else empty."""
    tokenizer, ((by, times),) = rendered.tokenizer, differences.most_common(1)
    bos = tokenizer.bos_token_id
    if bos is None or times < rows or abs(by) != 1:
        return ""
    has = all(prompt[:1] == [bos] for prompt in rendered.prompts)
    if by == -1:
        return f"as a missing beginning of sequence ({tokenizer.bos_token}) would make it" if has else ""
    which = "a second" if has else "an added"
    return f"as {which} beginning of sequence ({tokenizer.bos_token}) would make it"


def _written_marks(answers: Sequence[str], rendered: RenderedRows, template: ChatTemplate) -> Finding:
    marks = frozenset(mark for mark in {*template.marks, *template.controls.tokens, *template.controls.written} if mark)
    pattern = compile_alternation(marks)
    spelled = [{*pattern.findall(answer)} for answer in answers]
    for at, own in enumerate(spelled):
        if own:
            row = rendered.rows[rendered.with_answer[at]]
            reference = until_stop(list(row["input_ids"][row["answer"] :]), rendered.stop_ids)
            own -= {*pattern.findall(rendered.tokenizer.decode(reference))}
    with_marks = np.flatnonzero([bool(own) for own in spelled])
    words = Counter(mark for own in spelled for mark in own)
    details: dict[str, Any] = {"rows": len(answers), "marks": dict(words.most_common())}
    if len(with_marks):
        named = ", ".join(f"{mark} ({times:,})" for mark, times in words.most_common(3))
        text = f"marks in answers: {len(with_marks):,} of {len(answers):,} answers of the server have marks of the "
        details["in words"] = f"{text}training's chat template in their text: {named}"
    interval = wilson(len(with_marks), len(answers))
    return WRITTEN_MARKS.measured(len(with_marks) / len(answers), bool(len(with_marks)), interval, details)
