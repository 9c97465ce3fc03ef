"""What a server does otherwise than the training, where it goes by a GGUF file's own tokenizer and chat template."""

import copy
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.models import ModelSet
from lorakit.evaluate.rendering import RenderedRows, render_rows
from lorakit.model.gguf_tokenizer import describe_differences, missed_stops
from lorakit.model.llama_cpp import GgufModel
from lorakit.prepare import GivenRows, Prepared
from lorakit.progress import Silent

if TYPE_CHECKING:
    from lorakit.evaluate.run import ModelResult

# Rows whose text is cut by both tokenizers, spread evenly.
_SAMPLE = 1000

TEMPLATE = Finding(
    "chat template",
    unit="share of the prompts that the file's own chat template writes otherwise than the training",
    threshold=0.0,
    why="A server writes prompts by the template in the file. The scores here are of the training's prompts, so they "
    "hold only for prompts that both write alike. Flagged where one differs.",
    remedy="Export the run again, or start the server with the training's template: llama-server --jinja "
    "--chat-template-file RUN/adapter/chat_template.jinja.",
)
TOKENS = Finding(
    "tokens",
    unit="share of the rows that llama.cpp cuts into other tokens than the tokenizer of the rows",
    threshold=0.0,
    why="A server cuts texts by llama.cpp's own tokenizer, which for some models is an approximation. The scores here "
    "are of the training's tokens. Flagged where one row differs.",
    remedy="Read under details which text is cut otherwise. Where it is more than a rare mark, use a newer llama.cpp "
    "for conversion and serving (--llama-cpp DIR), or serve the merged folder with a program that has the tokenizer.",
)
STOPS = Finding(
    "stop tokens",
    unit="share of the training's stop tokens at which llama.cpp does not stop",
    threshold=0.0,
    why="The answers here end at the tokens at which the training ended them. A server goes on after a token that the "
    "file does not name as an end. Flagged where one is not.",
    remedy='Give the server the token\'s text as a stop word, in each request ("stop": [...]), or export again.',
)


def measure_gguf(model: "ModelResult", model_set: ModelSet, file: Path | GivenRows | None) -> list[Finding]:
    """The findings about a GGUF file: its template and its stop tokens against those of the run that rendered the rows,
    if one did, and llama.cpp's tokens against those of the rows. `file`: of the rows, if they are not the run's."""
    spec, rendered = model.spec, model.rendered
    assert spec.gguf is not None
    run = spec.prepared or model_set.prepared
    by_run = run is not None and rendered.tokenizer is run.tokenizer
    with GgufModel(spec.gguf.path) as vocabulary:
        findings = [_measure_tokens(rendered, vocabulary)]
        if run and by_run:
            missed = missed_stops(vocabulary, run.stop_ids)
            words = run.tokenizer.convert_ids_to_tokens(missed)
            share = len(missed) / max(len(run.stop_ids), 1)
            findings.append(STOPS.measured(share, bool(missed), None, {"missed": words}))
    return [*_measure_template(model, model_set, run, file), *findings] if run and by_run else findings


def _measure_tokens(rendered: RenderedRows, vocabulary: GgufModel) -> Finding:
    rows = rendered.rows[:: max(1, len(rendered.rows) // _SAMPLE)]
    texts = [str(rendered.tokenizer.decode(row["input_ids"], skip_special_tokens=False)) for row in rows]
    differing = describe_differences(rendered.tokenizer, vocabulary, texts)
    details = {"rows": len(texts), "first difference": differing[0] if differing else None}
    return TOKENS.measured(len(differing) / len(texts), bool(differing), None, details)


def _measure_template(
    model: "ModelResult", model_set: ModelSet, run: Prepared, file: Path | GivenRows | None
) -> list[Finding]:
    """How many prompts the file's template writes otherwise; nothing where rows are not conversations."""
    rendered, spec = model.rendered, model.spec
    assert spec.gguf is not None
    template = spec.gguf.header.chat_template
    if not run.tokenizer.chat_template or not rendered.prompts:
        return []
    if template == run.tokenizer.chat_template:
        return [TEMPLATE.measured(0.0, False, None, {"same text": True})]
    if not template:
        return [TEMPLATE.measured(1.0, True, None, {"same text": False, "reason": "the file has no chat template"})]
    tokenizer = copy.copy(run.tokenizer)
    tokenizer.chat_template = template
    others = defaultdict(list)
    for row in render_rows(spec, tokenizer, model_set, file, Silent()):
        others[row["where"]].append(list(row["input_ids"][: row["answer"]]))
    answered = {number: row for number, row in enumerate(rendered.rows) if row["answer"] >= 0}
    prompts = [(number, row["input_ids"][: row["answer"]]) for number, row in answered.items()]
    differing = [number for number, prompt in prompts if list(prompt) not in others[rendered.rows[number]["where"]]]
    first = rendered.rows[differing[0]]["where"] if differing else None
    details = {"same text": False, "prompts": len(prompts), "first difference": first}
    return [TEMPLATE.measured(len(differing) / len(prompts), bool(differing), None, details)]
