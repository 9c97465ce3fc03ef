"""Standard output and error as a command finds them: a reader that has gone, a full disk, no UTF-8, or nothing."""

import errno
import io
import os
import sys
from typing import Any


class _Stream(io.FileIO):
    """Writes until the reader is gone, and then nowhere: the command itself goes on.

    A result that cannot be written is one error; lost progress and warnings are not, as there is nowhere to report it.
    """

    def __init__(self, handle: int, name: str, needed: bool) -> None:
        super().__init__(handle, "wb", closefd=False)
        self.called, self.needed, self.lost = name, needed, False

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        rest = memoryview(data).cast("B")
        while rest and not self.lost:
            try:
                rest = rest[super().write(rest) or 0 :]
            except OSError as error:
                self.lost = True
                hung_up = error.errno == errno.EPIPE or (error.errno == errno.EIO and self.isatty())
                if self.needed and not hung_up:
                    raise OSError(error.errno, error.strerror, self.called) from error
        return len(data)


def prepare_streams() -> None:
    """Replace both by streams that never end a command by themselves; streams that a caller has set stay.

    A character that the encoding lacks is written as Python writes it, such as `\\xe9`.
    """
    out: Any = sys.stdout
    if out is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    elif out == sys.__stdout__:
        buffered: Any = io.BufferedWriter(_Stream(out.fileno(), "standard output", needed=True))
        sys.stdout = io.TextIOWrapper(buffered, out.encoding, "backslashreplace", line_buffering=out.isatty())
    err: Any = sys.stderr
    if err is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    elif err == sys.__stderr__:
        # Without a buffer, since a signal's handler may warn while a line is being written.
        raw: Any = _Stream(err.fileno(), "standard error", needed=False)
        sys.stderr = io.TextIOWrapper(raw, err.encoding, "backslashreplace", write_through=True)
