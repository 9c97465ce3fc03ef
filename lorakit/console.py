"""The only module that prints: results on standard output, everything else on standard error.

Rows, file names, templates and models' answers may contain anything: every text is made visible before it is printed,
so that none of it controls the terminal or hides from the reader.
"""

import json
import logging
import re
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakit.amounts import without_nan

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from lorakit.report.watch import Frame

_PLAIN_SECONDS = 15.0  # where there is no terminal, a bar is a plain line at most this often
_BAR_WIDTH = 40
# What terminals obey or readers do not see: control characters but line break and tab; marks and overrides of the
# writing direction, line separators, invisible letters and tags; halves of surrogate pairs, which cannot be encoded.
# Joiners stay: Persian, Indic scripts and emoji are written with them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with every unseen character written as Python writes it, such as `\\x1b`."""
    return _UNSEEN.sub(lambda match: repr(match[0])[1:-1], text)


def keep_libraries_visible() -> None:
    """Make visible what libraries log and warn of, which may quote the user's files as well."""
    format_warning = warnings.formatwarning

    def visible_record(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = logging.LogRecord(*arguments, **named)
        with suppress(TypeError, ValueError):  # a message that does not fit its arguments: logging complains of it
            record.msg, record.args = visible(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(visible_record)
    warnings.formatwarning = lambda *arguments, **named: visible(format_warning(*arguments, **named))


def _console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # On a terminal lines break between words; in a pipe or a file a line stays one line.
    return Console(stderr=stderr, highlight=False, soft_wrap=not stream.isatty())


def result(text: str) -> None:
    """Print a result, which lacks at most its last line break."""
    sys.stdout.write(visible(text if text.endswith("\n") else text + "\n"))


def result_wrapped(text: str, under: str = "", begin: str = "") -> None:
    """Print a sentence after `begin`: on a terminal broken between words, `under` before each further line."""
    text = visible(text)
    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns - 1, 60)
        # Commands are to be copied: nothing is broken at a hyphen, or inside a word.
        wrapper = textwrap.TextWrapper(width, begin, under, break_on_hyphens=False, break_long_words=False)
        result(wrapper.fill(text))
    else:
        result(begin + text)


def result_json(facts: Any) -> None:
    """Print the one JSON document of `--json`."""
    text = json.dumps(without_nan(facts), indent=2, ensure_ascii=False, default=str)
    result(_UNSEEN.sub(lambda match: json.dumps(match[0])[1:-1], text))


def result_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], whole_lines: bool = False) -> None:
    """Print a table of figures: every column but the first is set to the right. `whole_lines`: in a pipe or a file no
    cell is broken, however wide the table is."""
    table = Table(title=_text(title) if title else None, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(_text(column), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    console = _console()
    if whole_lines and not sys.stdout.isatty():
        console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table, soft_wrap=False)


def result_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print named facts, one below the other, each beside its name."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    console = _console()
    table.add_column(overflow="fold", style="bold", max_width=console.width * 3 // 5)
    table.add_column(overflow="fold")
    for name, fact in facts:
        table.add_row(_text(name), _text(fact))
    console.print(table, soft_wrap=False)


def result_bars(title: str, bars: Sequence[tuple[str, int]]) -> None:
    """Print a histogram: each bar's label, its length by its number, and the number."""
    most = max((number for _, number in bars), default=0)
    table = Table(title=_text(title), title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(width=_BAR_WIDTH)
    table.add_column(justify="right", no_wrap=True, style="cyan")
    for label, number in bars:
        table.add_row(_text(label), Bar(most, 0, number, color="cyan"), _text(f"{number:,}"))
    _console().print(table, soft_wrap=False)


def result_frame(frame: "Frame") -> None:
    """Lines of text and charts, on standard output."""
    _console().print(_of_frame(frame), soft_wrap=True)


@contextmanager
def full_screen() -> Iterator[Callable[["Frame"], None]]:
    """The whole terminal for frames that follow each other; what was there comes back at the end."""
    from rich.live import Live

    with Live(console=_console(), screen=True, auto_refresh=False) as live:
        yield lambda frame: live.update(_of_frame(frame), refresh=True)


def _of_frame(frame: "Frame") -> Text:
    charts = [Text.from_ansi(chart) for chart in frame.charts]
    return Text("\n").join([Text(visible(frame.head)), *charts])


def result_masked(title: str, stretches: Sequence[tuple[str, bool]]) -> None:
    """Print a text whose trained stretches are green; without colours they stand between ⟦ and ⟧."""
    console = _console()
    text = _text(title + "\n")
    for piece, trained in stretches:
        piece = visible(piece)
        if trained and not console.is_terminal:
            piece = f"⟦{piece}⟧"
        text.append(piece, style="bold green" if trained else "dim")
    console.print(text)


def result_piece(text: str, dim: bool = False) -> None:
    """Print a piece of a text that goes on, at once."""
    if dim and sys.stdout.isatty():
        _console().print(_text(text, "dim"), end="")
    else:
        sys.stdout.write(visible(text))
    sys.stdout.flush()


def result_label(text: str) -> None:
    """Print a name that what follows belongs to, on a line of its own."""
    _console().print(_text(f"{text}:", "bold cyan"))


def result_tokens(texts: Sequence[tuple[str, bool]]) -> None:
    """Print the tokens of a text: special ones in colour, without colours between ⟦ and ⟧, others in turns plain and
    underlined, so that their edges show. Line breaks are marked."""
    console = _console()
    text, plain = Text(), False
    for piece, special in texts:
        shown = visible(piece).replace("\n", "↵\n")
        if special:
            text.append(shown if console.is_terminal else f"⟦{shown}⟧", style="bold magenta")
        else:
            plain = not plain
            text.append(shown, style="" if plain else "underline")
    console.print(text, end="" if text.plain.endswith("\n") else "\n")


def aside(text: str) -> None:
    """Print a fact beside the results, in a low voice."""
    _console(stderr=True).print(_text(text, "dim"))


def is_conversation() -> bool:
    """Whether someone types and reads at a terminal, on both sides."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def read_line(prompt: str, words: Callable[[str], Sequence[str]]) -> str:
    """A line that the user types, with the keys and the history of readline. `words`: what the tab key offers after
    what is typed so far. EOFError where the input ends."""
    try:
        import readline
    except ImportError:  # a Python built without it: the terminal's own keys remain
        return input(prompt)
    readline.set_completer_delims("")
    readline.set_completer(lambda typed, number: dict(enumerate(words(typed))).get(number))
    readline.parse_and_bind("tab: complete")
    coloured = not _console().no_color and _console().is_terminal
    # Between \x01 and \x02 stands what takes no room on the screen (readline's RL_PROMPT_START_IGNORE).
    return input(f"\x01\x1b[1;36m\x02{prompt}\x01\x1b[0m\x02" if coloured else prompt)


def error(text: str, plain: bool = False) -> None:
    """Print why the command failed; `plain` leaves its lines as they are, for editors that read `file:line:column`."""
    label = Text("" if plain else "error: ", style="bold red")
    _console(stderr=True).print(label + _text(text, "default"))


def error_of_lost(text: str) -> None:
    """Print an error beside a bar that nobody ends any more: a bar hides the cursor."""
    _console(stderr=True).show_cursor(True)
    error(text)


def _text(text: str, style: str = "") -> Text:
    """A text that rich prints as it is: no markup, no names of emoji."""
    return Text(visible(text), style=style)


class Terminal:
    """Progress for people: bars on a terminal, plain lines elsewhere; quiet when asked."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._live: RichProgress | None = None

    def say(self, text: str) -> None:
        if not self.quiet:
            self._line(text, "default")

    def warn(self, text: str) -> None:
        self._line(f"note: {text}", "yellow")

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0, unit: str = "") -> Iterator["_TerminalBar"]:
        bar, outer = _TerminalBar(self, label, total, done, unit), self._live
        if self.quiet or not sys.stderr.isatty():
            yield bar
            return
        live = self._live = outer or _start_bars()
        bar.task = live.add_task(visible(label), total=total or None, completed=done, note="", amount=bar.amount())
        try:
            yield bar
        finally:
            live.update(bar.task, refresh=True)
            if outer:
                live.remove_task(bar.task)
            else:
                live.stop()
                self._live = None

    def _line(self, text: str, style: str) -> None:
        console = self._live.console if self._live else _console(stderr=True)
        console.print(_text(text, style))


def _start_bars() -> "RichProgress":
    from rich import progress

    live = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=28),
        progress.TextColumn("{task.fields[amount]}", markup=False),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        console=_console(stderr=True),
    )
    live.start()
    return live


class _TerminalBar:
    """One piece of work: a task of the terminal's bars, or a line now and then where there is no task."""

    def __init__(self, terminal: Terminal, label: str, total: int, done: int, unit: str) -> None:
        self.terminal, self.label, self.total, self.done, self.unit = terminal, label, total, done, unit
        self.task: TaskID | None = None
        self.first, self.start = done, time.monotonic()
        self.last = self.start

    def amount(self) -> str:
        """`12/40`, or in megabytes where the unit is bytes."""
        if self.unit == "bytes":
            of = f"/{self.total / 1e6:,.1f}" if self.total else ""
            return f"{self.done / 1e6:,.1f}{of} MB"
        return f"{self.done}/{self.total}" if self.total else str(self.done)

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        if self.terminal._live and self.task is not None:
            fields: dict[str, Any] = {"note": visible(note)} if note else {}
            self.terminal._live.update(self.task, advance=amount, amount=self.amount(), **fields)
        elif (now := time.monotonic()) - self.last > _PLAIN_SECONDS:
            self.last = now
            left = (now - self.start) / max(self.done - self.first, 1) * max(self.total - self.done, 0)
            parts = [f"{self.label} {self.amount()}", note, f"{left:.0f} s left" if self.total else ""]
            self.terminal.say("  ".join(filter(None, parts)))
