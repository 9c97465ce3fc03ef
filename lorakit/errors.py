"""The errors that lorakit raises on purpose, what the system's own mean, and the exit code of each."""

import errno
import os
import re
from collections.abc import Iterator

EXIT_FAILED = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130


class LorakitError(Exception):
    """The run failed for a reason that is not in what the user wrote (exit code 1)."""

    exit_code = EXIT_FAILED
    one_a_line = False
    """Whether each line of the message is a finding of its own, which begins with its place."""


class UserError(LorakitError):
    """The recipe, the data or the arguments are wrong (exit code 2).

    The message says where, what was given, why it cannot be, and what to write instead.
    """

    exit_code = EXIT_USER


class Interrupted(LorakitError):
    """The user stopped the work with Ctrl-C or SIGTERM (exit code 130)."""

    exit_code = EXIT_INTERRUPTED


_ROOM = "Make room, or write to another disk (--output, LORAKIT_CACHE and TMPDIR say where lorakit writes)."
_MEMORY = "Close other programs, or ask for less at once; lorakit plan says what a recipe takes."
_RIGHTS = "Check its permissions and its owner, or give another path."
_SHORTER = "Give a shorter path."

# What the system refused -> cause and remedy. Those of _GIVEN lie in a path that was given: exit code 2.
SYSTEM_ERRORS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", _ROOM),
    errno.EDQUOT: ("your quota of the disk is used up", _ROOM),
    errno.EFBIG: ("a file would be larger than it may be (ulimit -f, or the file system)", "Raise the limit."),
    errno.EROFS: ("the file system is read-only", "Write to another (--output, LORAKIT_CACHE and TMPDIR say where)."),
    errno.EACCES: ("permission denied", _RIGHTS),
    errno.EPERM: ("permission denied", _RIGHTS),
    errno.EMFILE: ("too many open files", "Raise the limit (ulimit -n)."),
    errno.ENFILE: ("too many open files on this machine", "Close other programs."),
    errno.EAGAIN: ("the system gives no further process or thread (ulimit -u)", "Raise the limit."),
    errno.ENOMEM: ("out of memory", _MEMORY),
    errno.EIO: ("the disk or the network behind it failed", "Look at the system's log; try another disk."),
    errno.ESTALE: ("the network's file system lost the file", "Try again."),
    errno.ETIMEDOUT: ("the file system or the network does not answer", "Try again."),
    errno.EBUSY: ("is in use", "Try again when it is not."),
    errno.ENOENT: ("there is no such file or folder (any more)", "Was it moved or deleted meanwhile?"),
    errno.ENOLCK: ("the file system keeps no locks", "Write to another (--output)."),
    errno.ENAMETOOLONG: ("the path is too long", _SHORTER),
    errno.ELOOP: ("its links lead in a circle", "Fix the links, or give another path."),
    errno.ENOTDIR: ("a part of the path is a file", "Give another path."),
    errno.EISDIR: ("is a folder, not a file", "Give another path."),
}
_GIVEN = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
_MACHINES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}
# Libraries that lose the number: safetensors and tokenizers write it into the text; torch's file writer says the
# system's words when it opens a file, and nothing when it writes.
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_TORCH_WRITES = re.compile(r"PytorchStreamWriter failed|file write failed|iostream error|unexpected pos \d+ vs \d+")
_TORCH_OPENS = re.compile(r"open file failed with strerror: (.+)")
_NUL = re.compile("embedded null (byte|character)")
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|[Cc]an(?:'t|not) allocate memory|bad_alloc"
    r"|failed to map segment from shared object$"
)


def explain_error(error: BaseException) -> LorakitError | None:
    """An error of the system's, or of a library that met one, in words with a remedy; None where it is none."""
    if isinstance(error, LorakitError):
        return error
    for one in _chain(error):
        found = _one_explained(one)
        if found:
            return found
    return None


def exit_code_of(error: LorakitError) -> int:
    """The exit code of an error; 1 where what is called wrong came of the machine, such as of too many open files."""
    numbers = [_number(one) for one in _chain(error)]
    return EXIT_FAILED if any(number in _MACHINES for number in numbers) else error.exit_code


def _number(error: BaseException) -> int | None:
    """The system's number of an error; None where it has none."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and not isinstance(error, LorakitError):
        found = _NUMBER.search(str(error))
        number = int(found[1] or found[2]) if found else None
        words = _TORCH_OPENS.search(str(error))
        if words:
            number = next((known for known in SYSTEM_ERRORS if os.strerror(known) == words[1].strip()), None)
    return number


def _one_explained(error: BaseException) -> LorakitError | None:
    text = str(error)
    if isinstance(error, RecursionError):
        return UserError(
            "a recipe, a row, a template or a configuration of the model is nested too deeply to be read: "
            f"{text or 'the recursion has no end'}. Write it flatter."
        )
    if isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, ImportError)) and _NO_MEMORY.search(text)):
        return LorakitError(f"out of memory{': ' + _first_line(text) if text else ''}. {_MEMORY}")
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return _in_words(errno.EAGAIN, "")
    if isinstance(error, RuntimeError) and _TORCH_WRITES.search(text):
        return LorakitError(
            "a file could not be written to its end: the disk or your quota is full, or a limit on file sizes "
            f"(ulimit -f) was met. {_ROOM}"
        )
    if isinstance(error, UnicodeEncodeError):
        found = ascii(error.object[error.start : error.end])
        return UserError(
            f"a path or a text has the character {found}, which cannot be written as {error.encoding}. Take it out, or "
            "set a UTF-8 locale (LANG)."
        )
    if isinstance(error, ValueError) and _NUL.search(text):
        return UserError("a path has a NUL character, which no file's name can have. Write another path.")
    number = _number(error)
    if number not in SYSTEM_ERRORS:
        return None
    named = [os.fsdecode(name) for name in (getattr(error, "filename", None),) if isinstance(name, str | bytes)]
    said = error.strerror if isinstance(error, OSError) else None
    return _in_words(number, named[0] if named else "", said)


def _in_words(number: int, path: str, said: str | None = None) -> LorakitError:
    """`said` is what the system or Python says, by which others have written of it."""
    cause, remedy = SYSTEM_ERRORS[number]
    said = said or os.strerror(number)
    if said.lower() != cause:
        cause = f"{cause} ({said})"
    shown = path if len(path) <= 200 else f"{path[:100]}...{path[-60:]}"
    kind = UserError if number in _GIVEN else LorakitError
    return kind(f"{shown + ': ' if shown else ''}{cause}. {remedy}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came of, the last one first."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip(".")
