"""`template`: any columns, put into the turns that the recipe writes."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from lorakit.data.formats.columns import add_system_and_tools
from lorakit.data.formats.jinja_text import jinja_columns, jinja_mistake, render_jinja
from lorakit.data.formats.messages import mark_given_beginnings
from lorakit.data.formats.places import PlaceError, columns_in, fill_places, parse_places
from lorakit.data.rows import Conversation, Message
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.fields import JinjaPath, Wording
from lorakit.recipe.problem import PathParts
from lorakit.registry import FORMATS, NamedColumns, Section

_EXAMPLE = "{template: {user: '{question}', assistant: '{answer}'}}"


class Jinja(Section):
    """A text with conditions and loops: a Jinja template in a sandbox. Write one of the two keys."""

    jinja: JinjaPath | None = None
    """A file with the text. The resolved recipe holds what the file says, as `jinja_text`."""
    jinja_text: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    """The text itself. Columns are its variables, and `row` is the whole row: `{{ row["Column name"] }}`."""


TurnText = Annotated[str, Field(min_length=1), Wording("a text with {column} places", "'{question}'")] | Jinja


class FewShot(Section):
    """A fixed example: what is asked, and how it is answered."""

    user: TurnText
    """What is asked."""
    assistant: TurnText
    """How it is answered. It is read, and never trained."""


class TemplateTurn(Section):
    """One turn, or what is asked and its answer."""

    user: TurnText | None = None
    """What is asked."""
    assistant: TurnText | None = None
    """How it is answered."""
    train: bool = True
    """Whether the answer is trained, as far as `data.train_on` trains it."""


class Template(Section):
    """The turns into which columns are put: `{column}` in a text is the row's value, `{{` and `}}` are braces."""

    system: TurnText | None = None
    """The system prompt. Null takes the row's own column `system`."""
    examples: list[FewShot] = []
    """Fixed examples between the system prompt and the row's own turns. They are read, and not trained."""
    user: TurnText | None = None
    """What is asked."""
    assistant: TurnText | None = None
    """What is trained: the answer."""
    turns: list[TemplateTurn] = []
    """Several turns, in place of `user` and `assistant`."""
    missing: dict[str, str] = {}
    """Column -> the text that stands for it in rows where it is absent or null. Any other such column is an error."""

    def own_turns(self) -> list[TemplateTurn]:
        """The turns of the row itself, in whichever way they are written."""
        # Not validated again, for each row.
        return self.turns or [TemplateTurn.model_construct(user=self.user, assistant=self.assistant, train=True)]

    def texts(self) -> Iterator[tuple[PathParts, TurnText, bool]]:
        """Every text with its path, and whether it is a trained answer."""
        turns = enumerate(self.turns) if self.turns else [(0, self.own_turns()[0])]
        if self.system is not None:
            yield ("system",), self.system, False
        for number, shot in enumerate(self.examples):
            yield ("examples", number, "user"), shot.user, False
            yield ("examples", number, "assistant"), shot.assistant, False
        for number, turn in turns:
            path: PathParts = ("turns", number) if self.turns else ()
            yield from (((*path, "user"), turn.user, False),) if turn.user is not None else ()
            yield from (((*path, "assistant"), turn.assistant, turn.train),) if turn.assistant is not None else ()


def _named(text: TurnText) -> NamedColumns:
    if isinstance(text, str):
        return NamedColumns(columns_in(text))
    return jinja_columns(text.jinja_text) if text.jinja_text else NamedColumns(every=True)


def _named_columns(settings: Template) -> NamedColumns:
    """What all texts name. A column that is needed in one of them is needed, unless `missing` has it."""
    each = [(_named(text), trained) for _, text, trained in settings.texts()]
    union = frozenset[str]().union
    needed = union(*(one.needed for one, _ in each)) - settings.missing.keys()
    names = union(*(one.needed | one.optional for one, _ in each))
    unread = frozenset({"system"} if settings.system is not None else ())
    answers = union(*(one.needed | one.optional for one, trained in each if trained))
    return NamedColumns(needed, names - needed, answers, unread, any(one.every for one, _ in each))


def _template_mistakes(settings: Template) -> Iterator[tuple[PathParts, str, str]]:
    yield from _mistakes_of_turns(settings)
    bad = False
    for path, text, _ in settings.texts():
        for reason, remedy in _mistakes_of_text(text):
            bad = True
            yield path, reason, remedy
    named = [(_named(text), trained) for _, text, trained in settings.texts()]
    names = {name for one, _ in named for name in one.needed | one.optional}
    for name in () if bad or any(one.every for one, _ in named) else settings.missing:
        if name not in names:
            near = nearest(name, names)
            remedy = f"Did you mean {near!r}?" if near else "Remove the line."
            yield ("missing", name), "no text has a place for this column", remedy
    trained = [one for one, is_trained in named if is_trained]
    if trained and not bad and not any(one.needed or one.optional or one.every for one in trained):
        path = next(path for path, _, is_trained in settings.texts() if is_trained)
        yield path, "it names no column, so that every row would train the same answer", "Write for example '{answer}'."


def _mistakes_of_turns(settings: Template) -> Iterator[tuple[PathParts, str, str]]:
    short = [key for key in ("user", "assistant") if getattr(settings, key) is not None]
    if settings.turns and short:
        yield (short[0],), "turns are written besides", "Write user and assistant, or turns."
    elif not settings.turns and len(short) < 2:
        lacking = "user and assistant" if not short else "assistant" if short == ["user"] else "user"
        yield (), f"{lacking} must be written, or turns", f"Write for example {_EXAMPLE}."
    answered = False
    for number, turn in enumerate(settings.turns):
        if turn.user is None and turn.assistant is None:
            yield ("turns", number), "it says nothing", "Write user, assistant, or both."
        if turn.assistant is None and not turn.train:
            yield ("turns", number, "train"), "there is no answer in this turn", "Remove the line."
        if answered and turn.user is None and turn.assistant is not None and turn.train:
            yield (
                ("turns", number),
                "an answer that is not trained stands before it",
                "Write what is asked between them.",
            )
        answered = turn.assistant is not None and not turn.train
    if settings.turns and not any(turn.train and turn.assistant is not None for turn in settings.turns):
        yield ("turns",), "no answer of these is trained", "Write assistant, without train: false, in one of them."


def _mistakes_of_text(text: TurnText) -> Iterator[tuple[str, str]]:
    if isinstance(text, str):
        try:
            parse_places(text)
        except PlaceError as error:
            yield error.reason, error.remedy
    elif (text.jinja is None) == (text.jinja_text is None):
        yield "it needs one of jinja and jinja_text", "Write jinja: FILE, or jinja_text and the text itself."
    elif text.jinja_text is not None and (reason := jinja_mistake(text.jinja_text)):
        yield reason, "Correct the template."


@FORMATS.register(
    "template",
    columns=(),
    optional=("system", "tools"),
    settings=Template,
    mistakes=_template_mistakes,
    named=_named_columns,
    needs_settings=_EXAMPLE,
)
def template(record: Mapping[str, Any], settings: Template) -> Conversation:
    """Any columns: the settings are the turns, in whose texts `{column}` stands for a row's value."""
    write = functools.partial(_write, record=record, missing=settings.missing)
    messages: list[Message] = []
    if settings.system is not None and (system := write(settings.system)):
        messages.append({"role": "system", "content": system})
    for shot in settings.examples:
        messages.append({"role": "user", "content": write(shot.user)})
        messages.append({"role": "assistant", "content": write(shot.assistant), "train": False})
    for turn in settings.own_turns():
        if turn.user is not None:
            messages.append({"role": "user", "content": write(turn.user)})
        if turn.assistant is not None:
            unread = {} if turn.train else {"train": False}
            messages.append({"role": "assistant", "content": write(turn.assistant), **unread})
    own = {name: record[name] for name in ("system", "tools") if name in record and _is_read(name, settings)}
    return replace(add_system_and_tools(own, mark_given_beginnings(messages)), fixed=2 * len(settings.examples))


def _is_read(name: str, settings: Template) -> bool:
    """Whether the column `system` or `tools` is read as in other formats: not where a text has a place for it, nor a
    system prompt beside the recipe's."""
    if name == "system" and settings.system is not None:
        return False
    return not any(name in named.needed | named.optional for named in (_named(text) for _, text, _ in settings.texts()))


def _write(text: TurnText, record: Mapping[str, Any], missing: Mapping[str, str]) -> str:
    if isinstance(text, str):
        return fill_places(text, record, missing)
    return render_jinja(str(text.jinja_text), record, missing)
