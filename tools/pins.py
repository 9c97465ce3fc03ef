"""Write requirements.txt: the exact versions of everything that is installed beside lorakit."""

import subprocess
import sys
from pathlib import Path

HEAD = """\
# The versions that lorakit is developed and tested with; the Makefile installs from this file.
# pyproject.toml holds the floors. To renew: make pins
"""
NOT_PINNED = ("lorakit", "pip", "setuptools", "uv", "wheel", "nvidia-", "triton", "cuda-")


def main() -> None:
    """Freeze the environment; torch without its build, which tools/install.sh chooses for each machine."""
    command = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    frozen = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pins = [pin.split("+")[0] for pin in frozen if "==" in pin and not pin.lower().startswith(NOT_PINNED)]
    target = Path(__file__).resolve().parent.parent / "requirements.txt"
    target.write_text(HEAD + "\n".join(pins) + "\n", encoding="utf-8")
    print(f"{target.name}: {len(pins)} packages")


if __name__ == "__main__":
    main()
