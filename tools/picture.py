"""The README's picture: real output of `lorakit train` and `lorakit eval` on recipes/debian-json, as docs/demo.svg.

python tools/picture.py [--run runs/demo]    # trains first where the run is not there: about five minutes
"""

import argparse
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/debian-json/recipe.yaml"
COLUMNS = 100
_LINES_OF_TRAINING = (4, 6)
"""Lines of the training's output that the picture shows, at its beginning and at its end."""


def main() -> None:
    """Run both commands on a terminal of their own, and draw what they print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/demo", help="the run's folder; it is used as it is where it is complete")
    parser.add_argument(
        "--log", type=Path, default=ROOT / "build/demo.log", help="the training's output, written and reused"
    )
    options = parser.parse_args()
    if not (ROOT / options.run / "adapter").is_dir() or not options.log.is_file():
        options.log.parent.mkdir(parents=True, exist_ok=True)
        options.log.write_text(on_terminal("train", RECIPE, "--output", options.run, "--overwrite"), encoding="utf-8")
    trained = options.log.read_text(encoding="utf-8").splitlines()
    first, last = _LINES_OF_TRAINING
    lines = [f"$ lorakit train {RECIPE}", *trained[:first], "...", *trained[-last:], f"$ lorakit eval {options.run}"]
    lines += on_terminal("eval", options.run).splitlines()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi("\n".join(lines)))
    console.save_svg(str(ROOT / "docs/demo.svg"), title="lorakit")


def on_terminal(*arguments: str) -> str:
    """What a command prints on a terminal, without what it wiped away again."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "LINES": "50"}
    command = [sys.executable, "-m", "lorakit", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(ours, 65536)
        except OSError:  # Linux says so when the last program has closed the terminal
            break
    if process.wait():
        raise SystemExit(output.decode())
    return shown_at_the_end(output.decode())


def shown_at_the_end(output: str) -> str:
    """The lines as a terminal shows them when all is printed: cursor movements and erased lines are carried out."""
    lines: list[str] = [""]
    row = 0
    for part in re.findall(r"\x1b\[\d*[A-HJK]|\x1b\[\?\d+[hl]|\r\n|\n|\r|[^\x1b\r\n]+|\x1b\[[\d;]*m|.", output):
        if part in ("\n", "\r\n"):
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            lines[row] = ""
        elif movement := re.fullmatch(r"\x1b\[(\d*)A", part):
            row = max(row - int(movement[1] or 1), 0)
        elif re.fullmatch(r"\x1b\[\d*K", part):
            lines[row] = ""
        elif not re.fullmatch(r"\x1b\[(\?\d+[hl]|\d*[B-HJ])", part):
            lines[row] += part
    return "\n".join(line for line in lines if line.strip())


if __name__ == "__main__":
    main()
