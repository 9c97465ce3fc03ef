"""The commands of a chat, each a function of what follows its name."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorakit.chat.reading import Entry
from lorakit.chat.saving import row_of
from lorakit.chat.session import ChatSession
from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest


@dataclass(frozen=True)
class ChatCommand:
    """One command. `usage`: what may follow its name; `help`: what it does, in a line."""

    usage: str
    help: str
    function: Callable[[ChatSession, str], None]


class LeaveChat(Exception):
    """The user ends the chat."""


def run_entry(session: ChatSession, entry: Entry) -> None:
    """Do what the user typed: a command, or a question that is answered. A UserError where it is neither."""
    named = entry.command()
    if named is None:
        if entry.strip():
            session.ask(str(entry))
        return
    name, argument = named
    command = COMMANDS.get(name)
    if command is None:
        near = nearest(name, COMMANDS, parts=True)
        remedy = f"Did you mean /{near}?" if near else "/help lists the commands."
        raise UserError(f"/{name} is not a command. {remedy} Nothing was sent: a question may not begin with a slash.")
    if argument and not command.usage:
        raise UserError(f"/{name}: nothing may follow it, and {argument!r} does. Nothing was done.")
    command.function(session, argument)


def _system(session: ChatSession, text: str) -> None:
    if not text:
        system = session.system_of(session.current)
        session.screen.say(f"system prompt: {system}" if system else "there is no system prompt of ours")
        return
    session.system = "" if text in ('""', "''") else text
    what = "the system prompt is another now" if session.system else "there is no system prompt now"
    session.screen.say(f"{what}, for the next question on")


def _adapter(session: ChatSession, name: str) -> None:
    if not name:
        rows = [
            (("* " if model is session.current else "  ") + model.name, model.describes) for model in session.models
        ]
        session.screen.facts(rows)
        return
    session.switch(name)
    session.screen.say(f"{session.current.name} answers now")


def _compare(session: ChatSession, text: str) -> None:
    if text in ("on", "off"):
        session.comparing = text == "on"
        who = ", ".join(model.name for model in session.models) if session.comparing else session.current.name
        session.screen.say(f"answers from now on: {who}")
        return
    if len(session.models) < 2:
        raise UserError("/compare: there is one model only. Give lorakit chat several, or a run.")
    if text:
        session.ask(text, compare=True)
    else:
        session.retry(compare=True)


def _retry(session: ChatSession, _: str) -> None:
    last = session.turns[-1].answer if session.turns else None
    if last and last.model == session.current.name and last.ended != "stopped" and session.decoding.temperature == 0:
        session.screen.say("at temperature 0 a model gives the same answer again; /temperature 0.8 draws others")
    session.retry()


def _seed(session: ChatSession, text: str) -> None:
    if text:
        session.decode(seed=_whole_number("/seed", text, least=0))
    session.screen.say(f"seed: {session.decoding.seed}")


def _temperature(session: ChatSession, text: str) -> None:
    if text:
        session.decode(temperature=parse_temperature("/temperature", text))
    greedy = session.decoding.temperature == 0
    session.screen.say(f"temperature: {session.decoding.temperature:g}" + (" (always the most likely token)" * greedy))


def _length(session: ChatSession, text: str) -> None:
    if text:
        session.decode(max_new_tokens=_whole_number("/length", text, least=1))
    session.screen.say(f"answers have at most {session.decoding.max_new_tokens:,} tokens")


def parse_temperature(where: str, text: str) -> float:
    """A number of at least 0; a UserError that begins with `where` otherwise."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{where}: {text!r} is not a temperature. Write 0 for the most likely token, or such as 0.8.")
    return value


def _whole_number(where: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise UserError(f"{where}: {text!r} is not a whole number of at least {least}.")
    return int(text)


def _tokens(session: ChatSession, _: str) -> None:
    if session.answered is None:
        raise UserError("/tokens: no question was sent yet.")
    session.screen.tokens(session.answered.prompt_texts())


def _save(session: ChatSession, name: str) -> None:
    if not name:
        raise UserError("/save: give the file to write, such as /save good.jsonl.")
    ended = sum(turn.answer.ended == "stop" for turn in session.turns)
    if not ended:
        raise UserError("/save: the conversation has no answer that the model ended itself, so nothing to train on.")
    row = row_of(session.turns, session.system_of(session.current))
    count = session.files.save(Path(name), session.conversation, row)
    left = len(session.turns) - ended
    note = f"; {left} of {len(session.turns)} answers were cut, and are read but not trained" if left else ""
    session.screen.say(f"saved: {name}, {count} conversation{'s' * (count > 1)}{note}")


def _clear(session: ChatSession, _: str) -> None:
    session.clear()
    session.screen.say("a new conversation")


def _help(session: ChatSession, _: str) -> None:
    rows = [(f"/{name} {command.usage}".strip(), command.help) for name, command in COMMANDS.items()]
    rows += [("...\\", "a line that ends with a backslash goes on in the next one")]
    rows += [('"""', 'so does a text up to the next """, which may begin with a slash')]
    rows += [("Ctrl-C", "stops an answer, or drops the line"), ("Ctrl-D", "leaves")]
    session.screen.facts(rows)


def _exit(session: ChatSession, _: str) -> None:
    raise LeaveChat


COMMANDS = {
    "system": ChatCommand("TEXT", 'set the system prompt ("" for none); alone: show it', _system),
    "adapter": ChatCommand("NAME", "let another of the models answer; alone: list them", _adapter),
    "compare": ChatCommand("QUESTION", "all models answer; on, off: every question; alone: the last one", _compare),
    "retry": ChatCommand("", "answer the last question again", _retry),
    "temperature": ChatCommand("T", "0: always the most likely token; above: draw tokens", _temperature),
    "seed": ChatCommand("N", "draw from this seed on", _seed),
    "length": ChatCommand("N", "the most tokens of an answer", _length),
    "tokens": ChatCommand("", "what the model really got for the last question", _tokens),
    "save": ChatCommand("FILE", "the conversation as a row that data.train reads (.jsonl)", _save),
    "clear": ChatCommand("", "begin a new conversation", _clear),
    "help": ChatCommand("", "this list", _help),
    "exit": ChatCommand("", "leave", _exit),
}


def completions(session: ChatSession, typed: str) -> list[str]:
    """What the tab key offers: names of commands, and of models after /adapter."""
    texts = [f"/{name}" + " " * bool(command.usage) for name, command in COMMANDS.items()]
    texts += [f"/adapter {model.name}" for model in session.models] if typed.startswith("/adapter ") else []
    return [text for text in texts if typed and text.startswith(typed) and text != typed]
