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
    """Whether each line of the message is a separate finding that begins with its place."""


class UserError(LorakitError):
    """The recipe, the data or the arguments are wrong (exit code 2).

    The message says where, what was given, why it cannot be, and what to write instead.
    """

    exit_code = EXIT_USER


class BaseModelError(UserError):
    """The base model is wrong, whoever names it: of a recipe it is `model.base`, and said so."""


class Interrupted(LorakitError):
    """The user stopped the work with Ctrl-C or SIGTERM (exit code 130)."""

    exit_code = EXIT_INTERRUPTED


_ROOM = "Make room, or write to another disk (--output, LORAKIT_CACHE and TMPDIR say where lorakit writes)."
_MEMORY = "Close other programs, or ask for less at once; lorakit plan says what a recipe takes."
_RIGHTS = "Check its permissions and its owner, or give another path."

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
    errno.EIO: ("the disk or the network behind it failed", "Look at the system log; try another disk."),
    errno.ESTALE: ("the network's file system lost the file", "Try again."),
    errno.ETIMEDOUT: ("the file system or the network does not answer", "Try again."),
    errno.EBUSY: ("is in use", "Try again when it is not."),
    errno.ENOENT: ("there is no such file or folder (any more)", "Was it moved or deleted meanwhile?"),
    errno.ENOLCK: ("the file system does not support locks", "Write to another (--output)."),
    errno.ENAMETOOLONG: ("the path is too long", "Give a shorter path."),
    errno.ELOOP: ("its links lead in a circle", "Fix the links, or give another path."),
    errno.ENOTDIR: ("a part of the path is a file", "Give another path."),
    errno.EISDIR: ("is a folder, not a file", "Give another path."),
}
_GIVEN = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK}
_MACHINES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}
# Libraries that lose the number: safetensors and tokenizers write it into the text; torch's file writer has the
# system's words when it opens a file, and nothing when it writes.
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_TORCH_WRITES = re.compile(r"PytorchStreamWriter failed|file write failed|iostream error|unexpected pos \d+ vs \d+")
_TORCH_OPENS = re.compile(r"open file failed with strerror: (.+)")
_NUL = re.compile("embedded null (byte|character)")
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|[Cc]an(?:'t|not) allocate memory|bad_alloc"
    r"|failed to map segment from shared object$|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED"
)


def explain_error(error: BaseException) -> LorakitError | None:
    """A system error, or a library's error that came of one, in words with a remedy; None for any other error."""
    if isinstance(error, LorakitError):
        return error
    return next((explained for one in _chain(error) if (explained := _explain_one(one))), None)


def exit_code_of(error: LorakitError) -> int:
    """The exit code of an error; 1 where the machine caused it, such as by too many open files."""
    return EXIT_FAILED if any(_number(one) in _MACHINES for one in _chain(error)) else error.exit_code


def is_of_the_disk(error: BaseException) -> bool:
    """Whether the disk or the file system failed: what comes next would fail as well, whatever it is."""
    return any(_number(one) in _DISKS or _TORCH_WRITES.search(str(one)) for one in _chain(error))


def first_line(error: BaseException) -> str:
    """The first line of a library's error without its full stop, with the second line where the first is only its
    heading; the name of its class where it has no text."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return (f"{first} {others[0].strip()}" if first.endswith(":") and others else first).rstrip(".")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, LorakitError):
        return None
    if words := _TORCH_OPENS.search(str(error)):
        return next((known for known in SYSTEM_ERRORS if os.strerror(known) == words[1].strip()), None)
    digits = _NUMBER.search(str(error))
    return int(digits[1] or digits[2]) if digits else None


def _explain_one(error: BaseException) -> LorakitError | None:
    text, number = str(error), _number(error)
    if isinstance(error, RecursionError):
        return UserError(
            "a recipe, a row, a template or a configuration of the model is nested too deeply to be read: "
            f"{text or 'the recursion has no end'}. Write it flatter."
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError | ImportError) and _NO_MEMORY.search(text)):
        return LorakitError(f"out of memory{': ' + first_line(error) if text else ''}. {_MEMORY}")
    if isinstance(error, RuntimeError) and _TORCH_WRITES.search(text):
        return LorakitError(
            "a file could not be written completely: the disk or your quota is full, or a limit on file sizes "
            f"(ulimit -f) was reached. {_ROOM}"
        )
    if isinstance(error, UnicodeEncodeError):
        character = ascii(error.object[error.start : error.end])
        return UserError(
            f"a path or a text has the character {character}, which cannot be written as {error.encoding}. Remove it, "
            "or set a UTF-8 locale (LANG)."
        )
    if isinstance(error, ValueError) and _NUL.search(text):
        return UserError("a path has a NUL character, which no file name can have. Write another path.")
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        number = errno.EAGAIN
    if number not in SYSTEM_ERRORS:
        return None
    cause, remedy = SYSTEM_ERRORS[number]
    words = (error.strerror if isinstance(error, OSError) else None) or os.strerror(number)
    if words.lower() != cause:  # the system's own words, or Python's, which others have written about
        cause = f"{cause} ({words})"
    given = getattr(error, "filename", None)
    path = os.fsdecode(given) if isinstance(given, str | bytes) else ""
    shown = path if len(path) <= 200 else f"{path[:100]}...{path[-60:]}"
    kind = UserError if number in _GIVEN else LorakitError
    return kind(f"{shown + ': ' if shown else ''}{cause}. {remedy}")
