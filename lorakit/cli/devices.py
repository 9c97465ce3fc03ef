"""One command in several processes, one a device: those that a launcher started, or that the command starts itself."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.amounts import counted
from lorakit.distributed.launchers import launched, refuse_accelerate_settings
from lorakit.distributed.processes import World
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.progress import Progress


@contextmanager
def on_devices(
    devices: int | None,
    most: Callable[[], int | None] | None = None,
    remedy: Callable[[], str] = lambda: "",
    starts: bool = True,
) -> Iterator[World]:
    """Within, this process is one of those that the command runs in: of those that its launcher started, or of
    `devices` that it starts itself, by default one a visible GPU; alone on one device. The process that starts others
    does not get there: it ends with their exit code.

    `most`: how many devices have work, looked up before anything starts; what it refuses ends the command. `remedy`:
    what to do where a process is killed. `starts`: whether others are started; else it is alone without a launcher."""
    from lorakit import console

    place, environment = launched(), dict(os.environ)
    if place is None:
        refuse_accelerate_settings(environment)
        if (count := _choose_count(devices, most)) > 1 and starts:
            sys.exit(_launch(count, remedy))
    from lorakit.distributed.join import joined

    with joined(console.error_of_lost) as world:
        if place is not None:
            refuse_accelerate_settings(environment)
            if devices not in (None, place.local_size):
                raise UserError(
                    f"--devices {devices}: {place.launcher} started {place.local_size} on this machine. Leave "
                    "--devices out, or start the command itself."
                )
        yield world


def _choose_count(devices: int | None, most: Callable[[], int | None] | None) -> int:
    limit = most() if most else None
    if devices == 1:
        return 1
    from lorakit.distributed.binding import count_devices

    visible = count_devices()
    if devices is None:
        return max(min(visible, limit or visible), 1)
    if visible and devices > visible:
        raise UserError(f"--devices {devices}: only {visible} GPUs are visible here. Write at most {visible}.")
    if limit and devices > limit:
        raise UserError(
            f"--devices {devices}: a step has {counted(limit, 'row')} (train.batch_size), and each device takes one at "
            f"least. Write at most {limit}."
        )
    return devices


def _launch(count: int, remedy: Callable[[], str]) -> int:
    from lorakit import console
    from lorakit.distributed.launch import launch
    from lorakit.hardware.threads import share_threads

    share_threads(count)
    # As `python -m` has it, the folder of the user would come before the packages: unless it did so here as well.
    safe = [] if sys.path and sys.path[0] in ("", str(Path.cwd())) else ["-P"]
    return launch(count, [*safe, "-m", "lorakit", *sys.argv[1:]], console.error_of_lost, remedy)


def terminal_of_first(quiet: bool) -> "Progress":
    """The terminal, of the first process; the others say nothing."""
    from lorakit import console
    from lorakit.distributed.processes import is_first
    from lorakit.progress import Silent

    return console.Terminal(quiet) if is_first() else Silent()
