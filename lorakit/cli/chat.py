"""`lorakit chat`"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.eval import Models, open_models
from lorakit.cli.options import BaseOption, Json, Quiet
from lorakit.errors import LorakitError, UserError

if TYPE_CHECKING:
    from lorakit.chat.session import ChatSession


def chat(
    models: Models = [],  # noqa: B006
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="A system prompt instead of the training's; empty for none."),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, metavar="T", help="0: always the most likely token, as in eval.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of answers at a temperature above 0.")] = 0,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="The most tokens of an answer.")
    ] = 512,
    base: BaseOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Talk to models in the terminal, with the chat template and the system prompt of their training.

    The first model given answers, of a run alone what it trained; [cyan]/adapter NAME[/cyan] lets another answer, on
    the same base in memory, and [cyan]/compare QUESTION[/cyan] all of them; [cyan]/help[/cyan] lists the commands.
    Questions may also come from a pipe, one a line, as turns of one conversation:
    [cyan]echo "..." | lorakit chat RUN[/cyan].
    """
    from lorakit import console
    from lorakit.cli.chat_screen import DocumentScreen, TerminalScreen

    progress = console.Terminal(quiet)
    typed = console.is_conversation() and not as_json
    with open_models(models, None, progress, servers_alone=True, base=base) as model_set:
        from lorakit.chat.commands import parse_temperature
        from lorakit.chat.models import Decoding
        from lorakit.chat.opening import first_model, open_chat_models
        from lorakit.chat.session import ChatSession

        decoding = Decoding(parse_temperature("--temperature", str(temperature)), seed, max_new_tokens)
        opened = open_chat_models(model_set, progress)
        first = first_model(opened, model_set)
        progress.say(f"loading {first.name}: {first.describes}")
        first.load()
        screen = DocumentScreen() if as_json else TerminalScreen(streams=sys.stdout.isatty())
        session = ChatSession(opened, first, decoding, screen, system)
        if typed:
            others = ", ".join(model.name for model in opened if model is not first)
            progress.say(f"{first.name} answers{' (also here: ' * bool(others)}{others}{')' * bool(others)}.")
            progress.say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
            _talk(session)
        else:
            _read_pipe(session)
    if isinstance(screen, DocumentScreen):
        console.result_json({**session.document(), "tokens": screen.token_texts})


def _talk(session: "ChatSession") -> None:
    """Take entries from the terminal until the user leaves."""
    from lorakit import console
    from lorakit.chat.commands import LeaveChat, completions, run_entry
    from lorakit.chat.interrupt import StopPressed, stop_key
    from lorakit.chat.reading import read_entry

    def read_line(goes_on: bool) -> str:
        return console.read_line(". " if goes_on else "> ", lambda typed: completions(session, typed))

    while True:
        try:
            with stop_key() as session.key:
                run_entry(session, read_entry(read_line))
        except StopPressed:
            console.aside("")
        except (EOFError, LeaveChat):
            return
        except UnicodeDecodeError as error:
            console.error(f"what was typed is not {error.encoding}. Nothing was sent.")
        except LorakitError as error:
            console.error(str(error))


def _read_pipe(session: "ChatSession") -> None:
    """Take entries from standard input, each a question or a command; the first error ends the chat."""
    from lorakit.chat.commands import LeaveChat, run_entry
    from lorakit.chat.reading import read_entry

    read_line = _line_reader()
    while True:
        try:
            run_entry(session, read_entry(read_line))
        except (EOFError, LeaveChat):
            return


def _line_reader() -> Callable[[bool], str]:
    numbers = iter(range(1, sys.maxsize))

    def read_line(goes_on: bool) -> str:
        number = next(numbers)
        try:
            line = sys.stdin.readline() if sys.stdin else ""
        except UnicodeDecodeError as error:
            raise UserError(f"standard input, line {number}: not {error.encoding}: save it as UTF-8.") from error
        if not line:
            raise EOFError
        return (line.removeprefix("\ufeff") if number == 1 else line).rstrip("\r\n")

    return read_line
