"""A pseudo-terminal for tests: a command runs in it, is typed to, and what it writes is read."""

import os
import pty
import re
import select
import subprocess
import sys
import time

_CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07|\x1b[=>]")
_SECONDS = 90


class TerminalOf:
    """A running command and its terminal. `text`: all that it wrote so far, without colours and cursor keys."""

    def __init__(self, *arguments, columns: int = 200) -> None:
        self._master, terminal = pty.openpty()
        environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "LORAKIT_DEBUG": "1"}
        command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
        streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
        self.process = subprocess.Popen(command, **streams, env=environment, start_new_session=True, preexec_fn=_adopt)
        os.close(terminal)
        self.raw, self._at = "", 0
        self._bytes = b""

    @property
    def text(self) -> str:
        return self._text_from(0)

    def _text_from(self, start: int) -> str:
        return _CODES.sub("", self.raw[start:]).replace("\r\n", "\n")

    def send(self, line: str) -> None:
        """Type a line; what is waited for next comes after it."""
        self._at = len(self.raw)
        os.write(self._master, (line + "\n").encode())

    def press(self, key: str) -> None:
        """Press keys, or a key such as Ctrl-C, at which the system drops what was typed before and not read yet."""
        self._at = len(self.raw)
        os.write(self._master, key.encode())

    def interrupt(self, pattern: str) -> str:
        """Press Ctrl-C until the pattern was written. Python's readline loses one that comes between a key and its
        waiting for the next one (readline_until_enter_or_signal in CPython's Modules/readline.c)."""
        self._at = len(self.raw)
        for _ in range(_SECONDS):
            os.write(self._master, b"\x03")
            end = time.monotonic() + 1
            while time.monotonic() < end:
                self._read()
                if match := re.search(pattern, self._text_from(self._at)):
                    return self._text_from(self._at)[: match.end()]
        raise AssertionError(f"no {pattern!r} after Ctrl-C in {self.text!r}")

    def wait(self, pattern: str) -> str:
        """What was written since the last keys, once the pattern is in it."""
        end = time.monotonic() + _SECONDS
        while not (match := re.search(pattern, self._text_from(self._at))):
            assert time.monotonic() < end, f"no {pattern!r} in {self._text_from(self._at)!r}"
            if not self._read():
                raise AssertionError(f"it ended without {pattern!r}: {self._text_from(self._at)!r}")
        return self._text_from(self._at)[: match.end()]

    def end(self) -> int:
        """Read until the command ends; its exit code."""
        while self._read():
            pass
        os.close(self._master)
        return self.process.wait(_SECONDS)

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 1)[0]:
            return True
        try:
            part = os.read(self._master, 1 << 16)
        except OSError:  # the last writer has gone
            return False
        self._bytes += part
        self.raw = self._bytes.decode(errors="ignore")
        return bool(part)


def _adopt() -> None:
    """Make the terminal that of the new session, so that Ctrl-C reaches its process as a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
