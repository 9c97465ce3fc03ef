"""The held-out rows as each model's tokenizer and chat template render them."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lorakit.data.answers import reference_of
from lorakit.data.chat_template import ChatTemplate, NoChatTemplate
from lorakit.data.dataset import Examples
from lorakit.data.examples import examples_of, tokenizer_sha256
from lorakit.data.report import SourceReport
from lorakit.data.rows import IGNORED, Message
from lorakit.data.template_source import writes_date
from lorakit.errors import UserError
from lorakit.evaluate.models import EvalModelSpec, ModelSet
from lorakit.model.config_values import Positions
from lorakit.model.gguf_tokenizer import has_vocabulary_of
from lorakit.model.resolve import Base
from lorakit.model.tokenizer import load_tokenizer, pad_token_id, stop_token_ids
from lorakit.plan.model_info import read_model_info
from lorakit.prepare import GivenRows, Prepared, data_of_file
from lorakit.progress import Progress
from lorakit.recipe.fields import is_split
from lorakit.recipe.schema import Data

Row = dict[str, Any]
Turns = Literal["last", "all"]
MOST_TASKS = 50
"""Tags up to which each is scored by itself."""


@dataclass(frozen=True, eq=False)
class RenderedRows:
    """Rows as one tokenizer renders them: input_ids, labels, `answer` (the index of the token at which the last answer
    begins, -1 without one: then none is generated), `where`, `task` (its tag, or nothing) and `source` (its number
    among `sources`). `turns`: whether the last answer of a row is generated, or each that is trained."""

    tokenizer: Any
    stop_ids: tuple[int, ...]
    rows: list[Row]
    sources: list[SourceReport]
    turns: Turns = "last"

    @property
    def pad(self) -> int:
        """The token that fills up short rows."""
        return pad_token_id(self.tokenizer)

    @cached_property
    def tags(self) -> list[str]:
        """The tag of each row; empty ones where there are too many to be tasks."""
        tags = [str(row["task"]) for row in self.rows]
        return tags if len({*tags}) <= MOST_TASKS else [""] * len(tags)

    @cached_property
    def answers(self) -> list[tuple[int, int]]:
        """Each answer as the number of its row, and the index of the token at which it begins."""
        rows = ((number, row) for number, row in enumerate(self.rows) if row["answer"] >= 0)
        return [(number, start) for number, row in rows for start in _answer_starts(row, self.turns)]

    @cached_property
    def with_answer(self) -> list[int]:
        """The row of each answer."""
        return [number for number, _ in self.answers]

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The tokens before each answer."""
        return [self.rows[number]["input_ids"][:start] for number, start in self.answers]

    @cached_property
    def references(self) -> list[str]:
        """The text of each answer."""
        return [reference_of(self.rows[number], self.tokenizer, self.stop_ids, start) for number, start in self.answers]

    @cached_property
    def characters(self) -> list[int]:
        """How many characters of each row are trained."""
        trained = ([token for token in row["labels"][1:] if token != IGNORED] for row in self.rows)
        return [len(self.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in trained]


def _answer_starts(row: Row, turns: Turns) -> list[int]:
    """Where the answers of a row begin: of all turns those at which a trained stretch begins. Where trained stretches
    are not turns, as with `data.train_on: all`, the last one alone."""
    last, labels = row["answer"], row["labels"]
    if turns == "last":
        return [last]
    starts = [at for at, label in enumerate(labels) if label != IGNORED and (at == 0 or labels[at - 1] == IGNORED)]
    return starts if starts and starts[-1] == last and starts[0] > 0 else [last]


def render_for_models(
    model_set: ModelSet, file: Path | GivenRows | None, progress: Progress
) -> tuple[list[RenderedRows], str]:
    """The same rows rendered for each model, in one object where they are alike, and where they come from in words."""
    data, source = data_section(model_set, file)
    run = model_set.prepared if file is None else None
    run_key = _template_key(row_template(run.tokenizer, run, None)) if run else ""
    keys, by_key = dict[int, str](), dict[str, RenderedRows]()
    for number, (spec, tokenizer) in enumerate(zip(model_set.specs, load_tokenizers(model_set, progress), strict=True)):
        if spec.endpoint:
            continue
        template = row_template(tokenizer, spec.prepared, model_set.prepared)
        key = _template_key(template)
        keys[number] = key
        if key in by_key:
            continue
        if template.date == date.today().isoformat():
            progress.say(f"{spec.given}: its chat template writes a date: {template.date}")
        try:
            held_out = run.held_out if run and key == run_key else None
        except UserError as error:
            raise UserError(f"{error} Give other rows with --data FILE.") from error
        stops, examples = (run.stop_ids, held_out) if run and held_out else _render(spec, data, template, progress)
        for line in examples.report.findings.lines("x"):
            progress.warn(f"held-out: {line}")
        by_key[key] = RenderedRows(tokenizer, tuple(stops), list(examples.rows), examples.report.sources)
    every = list(by_key.values())
    aligned = _align(every)
    left_out = len(every[0].rows) - len(aligned[0].rows)
    if left_out:
        progress.warn(f"{left_out:,} rows are left out: not every model's tokenizer and template render them")
    if not aligned[0].rows:
        raise UserError(f"{source}: no rows left to score.")
    contents = [(one.stop_ids, [(row["input_ids"], row["labels"]) for row in one.rows]) for one in aligned]
    shared = {key: aligned[contents.index(content)] for key, content in zip(by_key, contents, strict=True)}
    return [shared[keys.get(at, keys[model_set.reference])] for at in range(len(model_set.specs))], source


def data_section(model_set: ModelSet, file: Path | GivenRows | None) -> tuple[Data, str]:
    """The data section of the held-out rows, and a phrase that says where they come from."""
    prepared = model_set.prepared
    data = prepared.recipe.data if prepared else None
    if file is not None:
        return data_of_file(file, data, positions_of_model(model_set.specs[model_set.reference])), str(file)
    if prepared is None or data is None:
        raise UserError("no held-out rows: none of these is a run. Write --data FILE, or give a run as well.")
    if data.eval is None:
        raise UserError(
            "data.eval: the recipe names no held-out rows to score on. Write a file, or a fraction, or give "
            "--data FILE."
        )
    try:
        owner = model_set.run.folder if model_set.run else model_set.specs[0].given
        return prepared.rows.held_out_section, f"the held-out rows of {owner}"
    except UserError as error:
        raise UserError(f"{error} Give other rows with --data FILE.") from error


def _render(spec: EvalModelSpec, data: Data, template: ChatTemplate, progress: Progress) -> tuple[list[int], Examples]:
    """The held-out rows of a data section, or its training rows if it has no held-out ones; first the stop tokens."""
    words = own_stop_words(spec, template.tokenizer)
    template = replace(template, train_on=data.train_on, system=data.system, stop_words=words)
    if data.eval is not None and not is_split(data.eval):
        data = data.model_copy(update={"train": data.eval, "eval": None})
    try:
        train, held_out = examples_of(data, template, progress)
    except NoChatTemplate as error:
        raise UserError(
            f"{spec.given}: has no chat template, which conversations need. Give a run as well, whose template is then "
            "used."
        ) from error
    examples, tokenizer = held_out or train, template.tokenizer
    for line in examples.report.dropped.lines("rows are left out:"):
        progress.warn(line)
    for note, count in examples.report.notes.items():
        progress.say(f"{count:,} rows: {note}")
    stops = {*own_stop_ids(spec, tokenizer), *tokenizer.convert_tokens_to_ids(examples.report.stop_tokens)}
    return sorted(stops), examples


def render_rows(
    spec: EvalModelSpec, tokenizer: Any, model_set: ModelSet, file: Path | GivenRows | None, progress: Progress
) -> list[Row]:
    """The rows that are scored as another tokenizer or chat template writes them; those that it cannot write are left
    out."""
    template = row_template(tokenizer, spec.prepared, model_set.prepared)
    return list(_render(spec, data_section(model_set, file)[0], template, progress)[1].rows)


def own_stop_ids(spec: EvalModelSpec, tokenizer: Any) -> list[int]:
    """Every token at which a model's own files end an answer."""
    if spec.gguf:
        ends = {*spec.gguf.stop_ids, tokenizer.eos_token_id}
        return sorted(token for token in ends if isinstance(token, int) and token < len(tokenizer))
    return stop_token_ids(spec.loaded[0], tokenizer)


def own_stop_words(spec: EvalModelSpec, tokenizer: Any) -> tuple[str, ...]:
    """The texts of `own_stop_ids`."""
    return tuple(word for word in tokenizer.convert_ids_to_tokens(own_stop_ids(spec, tokenizer)) if word)


def positions_of_model(spec: EvalModelSpec) -> Positions | None:
    """How many positions a model has; None where it has no limit, or its files do not say."""
    if spec.gguf:
        return spec.gguf.header.positions
    if spec.endpoint:
        return None
    info = read_model_info(spec.loaded[0].folder)
    return info.positions if info else None


def _align(several: Sequence[RenderedRows]) -> list[RenderedRows]:
    """The rows that all renderings have, in the order of the first. A row is known by its place; one that another
    template turns into another number of examples is left out."""
    counts = [Counter(row["where"] for row in rendered.rows) for rendered in several]
    shared = [place for place, count in counts[0].items() if all(other[place] == count for other in counts)]
    order = {place: number for number, place in enumerate(shared)}
    aligned = []
    for rendered in several:
        rows = [row for row in rendered.rows if row["where"] in order]
        aligned.append(replace(rendered, rows=sorted(rows, key=lambda row: order[row["where"]])))
    return aligned


def prompt_template(spec: EvalModelSpec, tokenizer: Any, model_set: ModelSet) -> ChatTemplate:
    """The template that writes prompts for a model. Models without a run get the system prompt and the variables of the
    first run, so that all get the same prompt. If none of a run's rows has a thought, and they are trained after a
    prompt that opens none, its model gets that prompt."""
    prepared = spec.prepared or model_set.prepared
    template = replace(
        row_template(tokenizer, spec.prepared, model_set.prepared),
        system=prepared.recipe.data.system if prepared else None,
        stop_words=own_stop_words(spec, tokenizer),
    )
    if prepared is None or not tokenizer.chat_template:
        return template
    return replace(template, variables=prompt_variables(template, prepared))


def prompt_variables(template: ChatTemplate, prepared: Prepared) -> dict[str, Any]:
    """The variables with which a run's prompts are written: the recipe's, and where no row has a thought, that with
    which the prompt opens none."""
    thoughtless = prepared.report.notes.get(template.note_without_thoughts) == prepared.report.used
    return {**template.variables, **(template.without_thoughts if thoughtless else {})}


def write_prompt(messages: Sequence[Message], template: ChatTemplate) -> str:
    """The messages as the template writes them for the model to answer, after the template's system prompt where they
    have none. A RowError where the template refuses them."""
    if template.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": template.system}, *messages]
    return template.write([template.adapt(message) for message in messages], ask=True)


def tokens_of_prompt(text: str, template: ChatTemplate) -> list[int]:
    return list(template.tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_stop_ids(spec: EvalModelSpec, template: ChatTemplate) -> tuple[int, ...]:
    """The tokens that end an answer to a prompt of this template."""
    tokenizer = template.tokenizer
    own = spec.prepared.stop_ids if spec.prepared else own_stop_ids(spec, tokenizer)
    return tuple(sorted({*own, *tokenizer.convert_tokens_to_ids(sorted(template.stops))}))


def row_template(tokenizer: Any, own: Prepared | None, first: Prepared | None) -> ChatTemplate:
    """A model's chat template with the variables and the date of its own run. Models without a run get those of the
    first run, as far as their template reads them."""
    prepared = own or first
    variables = prepared.recipe.model.template_variables if prepared else {}
    day = prepared.recipe.model.template_date if prepared else None
    if day in (None, "auto"):
        day = date.today().isoformat()
    if own is None and variables and tokenizer.chat_template:
        read = ChatTemplate(tokenizer).reads.constants
        variables = {name: value for name, value in variables.items() if name in read}
    return ChatTemplate(tokenizer, variables=variables, date=day if writes_date(tokenizer.chat_template) else None)


def _template_key(template: ChatTemplate) -> str:
    """Equal for templates and tokenizers that render rows alike."""
    given = json.dumps([dict(template.variables), template.date], sort_keys=True)
    return f"{tokenizer_sha256(template.tokenizer)} {given}"


def load_tokenizers(model_set: ModelSet, progress: Progress) -> list[Any]:
    """The tokenizer of each model: its run's, the one beside its adapter if that has a chat template, or its base's. Of
    a GGUF file the first run's, where it has the same vocabulary, else the file's own. Of a server's model that
    of the reference."""
    tokenizers: list[Any] = []
    run = model_set.prepared
    template = run.tokenizer.chat_template if run else None
    for spec in model_set.specs:
        if spec.prepared:
            tokenizers.append(spec.prepared.tokenizer)
            continue
        if spec.endpoint:
            tokenizers.append(None)
            continue
        if spec.gguf and run and has_vocabulary_of(spec.gguf.header, run.tokenizer):
            tokenizers.append(run.tokenizer)
            continue
        tokenizer = spec.gguf.tokenizer if spec.gguf else _tokenizer_of_folder(spec)
        if template and not tokenizer.chat_template:
            progress.warn(f"{spec.given}: has no chat template of its own; the first model's is used")
            tokenizer.chat_template = template
        template = template or tokenizer.chat_template
        tokenizers.append(tokenizer)
    reference = tokenizers[model_set.reference]
    return [reference if spec.endpoint else one for spec, one in zip(model_set.specs, tokenizers, strict=True)]


def _tokenizer_of_folder(spec: EvalModelSpec) -> Any:
    base, tokenizer = spec.loaded[0], None
    if spec.adapter and (spec.adapter / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(Base(spec.given, spec.adapter, base.origin), None)
    if tokenizer is None or not tokenizer.chat_template:
        of_base = load_tokenizer(Base(spec.given, base.folder, base.origin), None)
        # One with more tokens writes rows that the adapter trained.
        tokenizer = tokenizer if tokenizer is not None and len(tokenizer) > len(of_base) else of_base
    return tokenizer
