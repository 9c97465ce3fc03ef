"""The tokenizer of each subject, and the rows as it renders them, again only where they differ."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from lorakit.data.dataset import Examples
from lorakit.data.examples import tokenizer_sha256
from lorakit.data.rendering import ChatTemplate, NoChatTemplate
from lorakit.data.template_date import asks_for_date
from lorakit.errors import UserError
from lorakit.evaluate.models import EvalModelSpec, ModelSet
from lorakit.evaluate.rendering import (
    RenderedRows,
    align_rows,
    data_section,
    render_rows,
    rows_of_examples,
    warn_of_problems,
)
from lorakit.model.base import Base
from lorakit.model.load import load_tokenizer, stop_words
from lorakit.plan.facts import facts_in
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.recipe.schema import Data

# The longest row, in tokens, where neither a recipe nor the model's own config says it.
_LONGEST = 1024


def render_for_models(model_set: ModelSet, file: Path | None, progress: Progress) -> tuple[list[RenderedRows], str]:
    """What each subject is asked, row by row the same, and in words where the rows come from.

    Subjects whose tokenizers render the rows alike share one object.

    Raises:
        UserError: there are no rows, or no chat template to render them with.
    """
    data, told = _data(model_set, file)
    tokenizers = load_tokenizers(model_set, progress)
    first_run = model_set.prepared if file is None else None
    by_tokenizer: dict[str, RenderedRows] = {}
    own = _name(_template_of(first_run.tokenizer, first_run)) if first_run else ""
    names, today = [], date.today().isoformat()
    for spec, tokenizer in zip(model_set.specs, tokenizers, strict=True):
        template = row_template(spec, model_set, tokenizer)
        name = _name(template)
        names.append(name)
        if template.date == today and name not in by_tokenizer:
            progress.say(f"{spec.given}: its chat template writes a date: {today}")
        if name in by_tokenizer:
            continue
        held_out = _held_out(first_run) if first_run and name == own else None
        if first_run and held_out:
            warn_of_problems(held_out, progress)
            by_tokenizer[name] = rows_of_examples(held_out, tokenizer, first_run.stop_ids)
        else:
            by_tokenizer[name] = _rendered(spec, data, template, progress)
    one_each, left_out = align_rows(list(by_tokenizer.values()))
    if left_out:
        progress.warn(f"{left_out:,} rows are left out, which not every model's tokenizer and template render")
    if not one_each[0].rows:
        raise UserError(f"{told}: no rows left to score.")
    found = dict(zip(by_tokenizer, _shared(one_each), strict=True))
    return [found[name] for name in names], told


def _held_out(run: Prepared) -> Examples | None:
    try:
        return run.held_out
    except UserError as error:
        raise UserError(f"{error} Give other rows with --data FILE.") from error


def row_template(spec: EvalModelSpec, model_set: ModelSet, tokenizer: Any) -> ChatTemplate:
    """Its chat template with the variables and the day of its run; for others with those of the first run, as far as
    their template reads them, or else today."""
    template = _template_of(tokenizer, spec.prepared or model_set.prepared)
    if spec.prepared or not template.variables or not tokenizer.chat_template:
        return template
    read = ChatTemplate(tokenizer).reads.constants
    return replace(template, variables={name: value for name, value in template.variables.items() if name in read})


def _template_of(tokenizer: Any, prepared: Prepared | None) -> ChatTemplate:
    settings = prepared.recipe.model if prepared else None
    given = settings.template_date if settings else None
    day = date.today().isoformat() if given in (None, "auto") else given
    variables = settings.template_variables if settings else {}
    return ChatTemplate(tokenizer, variables=variables, date=day if asks_for_date(tokenizer.chat_template) else None)


def prompt_template(spec: EvalModelSpec, tokenizer: Any, model_set: ModelSet) -> ChatTemplate:
    """The template that writes prompts for a subject. The first run's system prompt and variables hold for subjects
    without a run: all are asked the same. Where all of a run's rows are without thoughts, and are trained behind a
    prompt that opens none, it is asked with that prompt."""
    prepared = spec.prepared or model_set.prepared
    system = prepared.recipe.data.system if prepared else None
    words = stop_words(spec.base, tokenizer)
    template = replace(row_template(spec, model_set, tokenizer), system=system, stop_words=words)
    if prepared is None or not tokenizer.chat_template:
        return template
    report = prepared.report
    if report.notes.get(template.note_without_thoughts) != report.used:
        return template
    return replace(template, variables={**template.variables, **template.without_thoughts})


def _name(template: ChatTemplate) -> str:
    """A name for how a tokenizer and its template render rows."""
    given = json.dumps([dict(template.variables), template.date], sort_keys=True)
    return f"{tokenizer_sha256(template.tokenizer)} {given}"


def _rendered(spec: EvalModelSpec, data: Data, template: ChatTemplate, progress: Progress) -> RenderedRows:
    try:
        return render_rows(data, spec.base, template, progress)
    except NoChatTemplate as error:
        raise UserError(
            f"{spec.given}: has no chat template, which conversations need. Give a run beside it, whose template it "
            "then gets."
        ) from error


def load_tokenizers(model_set: ModelSet, progress: Progress) -> list[Any]:
    """The tokenizer of each subject: its run's, its own, or its base's.

    Raises:
        UserError: one cannot be loaded.
    """
    found: list[Any] = []
    template = model_set.prepared.tokenizer.chat_template if model_set.prepared else None
    for spec in model_set.specs:
        if spec.prepared:
            found.append(spec.prepared.tokenizer)
            continue
        found.append(_own_tokenizer(spec))
        if template and not found[-1].chat_template:
            progress.warn(f"{spec.given}: has no chat template of its own, and gets the first model's")
            found[-1].chat_template = template
        template = template or found[-1].chat_template
    return found


def _own_tokenizer(spec: EvalModelSpec) -> Any:
    """The tokenizer beside an adapter where it brings a chat template, or else the base's."""
    if spec.adapter and (spec.adapter / "tokenizer_config.json").is_file():
        beside = load_tokenizer(Base(spec.given, spec.adapter, spec.base.origin), None)
        if beside.chat_template:
            return beside
    return load_tokenizer(Base(spec.given, spec.base.folder, spec.base.origin), None)


def _data(model_set: ModelSet, file: Path | None) -> tuple[Data, str]:
    """The data section whose held-out rows are meant, and in words where they come from."""
    recipe = model_set.prepared.recipe if model_set.prepared else None
    if file is not None:
        return data_section(file, recipe.data if recipe else None, _longest(model_set.specs[0])), str(file)
    if recipe is None or model_set.run is None:
        raise UserError(
            "none of these is a run, which would bring held-out rows. Give them with --data FILE, or a run beside them."
        )
    if recipe.data.eval is None:
        raise UserError(
            "data.eval: the recipe names no held-out rows to score on. Write a file, or a fraction, or give "
            "--data FILE."
        )
    return recipe.data, f"the held-out rows of {model_set.run.folder}"


def _longest(spec: EvalModelSpec) -> int:
    facts = facts_in(spec.base.folder)
    return facts.positions.limit if facts and facts.positions and facts.positions.limit >= 8 else _LONGEST


def _shared(several: Sequence[RenderedRows]) -> list[RenderedRows]:
    """The same object for renderings that say the same."""
    found: list[RenderedRows] = []
    for rendered in several:
        like = next(
            (one for one in found if one.stop_ids == rendered.stop_ids and one.same_tokens_as(rendered)), rendered
        )
        found.append(like)
    return found
