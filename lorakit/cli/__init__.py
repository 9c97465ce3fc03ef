"""The command line: one small file a command."""

import atexit
import gc
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import typer
from typer.rich_utils import rich_format_error

from lorakit.cli import (
    benchmark,
    chat,
    check,
    combine,
    data,
    diff,
    doctor,
    export,
    extract,
    import_,
    lock,
    lr,
    merge,
    new,
    pack,
    plan,
    push,
    rate,
    report,
    retrain,
    runs,
    schema,
    sweep,
    train,
    watch,
)
from lorakit.cli import eval as evaluate
from lorakit.cli.streams import prepare_streams
from lorakit.distributed.launchers import PARENT
from lorakit.distributed.processes import FailedElsewhere
from lorakit.errors import EXIT_FAILED, EXIT_INTERRUPTED, LorakitError, exit_code_of, explain_error
from lorakit.hardware.threads import set_up_threads

app = typer.Typer(
    name="lorakit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a language model with LoRA from one YAML file, a [bold]recipe[/bold].\n\n"
    "A first session: [cyan]lorakit new NAME[/cyan], [cyan]lorakit check RECIPE[/cyan], "
    "[cyan]lorakit data RECIPE[/cyan], [cyan]lorakit train RECIPE[/cyan], "
    "[cyan]lorakit eval RUN[/cyan], [cyan]lorakit merge RUN[/cyan].",
    epilog="Exit codes: 0 done, 1 the run failed, 2 the recipe, the data or the arguments are wrong, 130 interrupted.",
)


# A command -> the one of an earlier version, and its options that it no longer has (A B: more arguments than it takes).
_MOVED = {
    "lorakit combine RUN RUN --method METHOD --weights 0.5,0.5 --output DIR": (
        "merge",
        ("A B", "--method", "--weights", "--density", "--seed", "--into-base"),
    ),
    "lorakit extract TUNED BASE --rank 32 --output DIR": ("merge", ("--extract", "--keep-whole", "--rank")),
    "lorakit benchmark RUN --tasks gsm8k,mmlu": (
        "eval",
        ("--tasks", "--tasks-path", "--limit", "--chat-template", "--allow-code"),
    ),
    "lorakit rate sheet RUN --questions FILE --output DIR": ("eval", ("--sheet", "--questions", "--overwrite")),
    "lorakit rate report FILE... --key FILE": ("eval", ("--ratings", "--key")),
}

# Wrong arguments and options of any kind; typer has no public name for it.
_USAGE_ERROR: Any = typer.BadParameter.__bases__[0]


def _version(given: bool) -> None:
    if given:
        import lorakit

        typer.echo(f"lorakit {lorakit.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of the program itself."""


COMMANDS: dict[str, Callable[..., None]] = {
    "new": new.new,
    "import": import_.import_,
    "check": check.check,
    "plan": plan.plan,
    "data": data.data,
    "train": train.train,
    "sweep": sweep.sweep,
    "lr": lr.lr,
    "eval": evaluate.evaluate,
    "benchmark": benchmark.benchmark,
    "chat": chat.chat,
    "rate sheet": rate.sheet,
    "rate report": rate.report,
    "merge": merge.merge,
    "combine": combine.combine,
    "extract": extract.extract,
    "export": export.export,
    "push": push.push,
    "pack": pack.pack,
    "unpack": pack.unpack,
    "report": report.report,
    "watch": watch.watch,
    "runs": runs.runs,
    "diff": diff.diff,
    "retrain": retrain.retrain,
    "lock": lock.lock,
    "schema": schema.schema,
    "doctor": doctor.doctor,
}


_rate = typer.Typer(no_args_is_help=True, help="Let people rate answers, without seeing which model gave them.")
for _name, _command in COMMANDS.items():
    if _name == "rate sheet":
        app.add_typer(_rate, name="rate")
    _group = _rate if _name.startswith("rate ") else app
    # Each paragraph of a docstring on one line, which the terminal then wraps to its own width.
    _help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(_command) or "")
    _group.command(_name.removeprefix("rate "), help=_help)(_command)


def main() -> None:
    """Entry point of `lorakit`: run a command, and turn errors into one message and an exit code."""
    from lorakit import console

    prepare_streams()
    set_up_threads()
    atexit.register(gc.freeze)  # or the interpreter looks through all that torch made once more, for most of a second
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _interrupt)
    console.keep_libraries_visible()
    try:
        code = app(prog_name="lorakit", standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # what typer makes of Ctrl-C
            _end_interrupted()
        sys.stdout.flush()
        sys.exit(code)
    except FailedElsewhere as error:
        sys.exit(error.exit_code)  # another process of this command says why
    except _USAGE_ERROR as error:
        if _is_beside_first():
            sys.exit(error.exit_code)
        if renamed := _new_spelling(error):
            _fail(renamed, error.exit_code)
        error.message = console.visible(error.message)
        rich_format_error(error)
        sys.exit(error.exit_code)
    except LorakitError as error:
        _fail(str(error), exit_code_of(error), plain=error.one_a_line)
    except KeyboardInterrupt:
        _end_interrupted()
    except Exception as error:
        if os.environ.get("LORAKIT_DEBUG"):
            raise
        if explained := explain_error(error):
            _fail(str(explained), explained.exit_code)
        _fail(
            f"{type(error).__name__}: {error}\nThis is a fault in lorakit, not in what you wrote. LORAKIT_DEBUG=1 "
            "shows where it happened: please report it with that.",
            EXIT_FAILED,
        )


def _end_interrupted() -> None:
    if PARENT in os.environ or _is_beside_first():
        sys.exit(EXIT_INTERRUPTED)  # the parent, or the first process, says so
    _fail("interrupted", EXIT_INTERRUPTED)


def _is_beside_first() -> bool:
    """Whether a launcher started this process beside another one of its machine, which reads the same arguments."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0"


def _new_spelling(error: Any) -> str | None:
    """A sentence that names today's command, if a usage error is about a command of an earlier version."""
    command, option = error.ctx.info_name if error.ctx else "", getattr(error, "option_name", None)
    if option is None and "unexpected extra argument" in error.message:
        option = "A B"
    new = next((new for new, (old, words) in _MOVED.items() if old == command and option in words), None)
    return f"`lorakit {command} {option}` is now `{new}`." if new else None


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: drafts are removed, the exit code is 130."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # one that follows by itself must not break off the removing
    raise KeyboardInterrupt


def _fail(text: str, code: int, plain: bool = False) -> None:
    from lorakit import console

    console.error(text, plain)
    sys.exit(code)
