"""What all processes of a training must agree on: when it stops, and the weights that it trains."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from lorakit.distributed.processes import any_of, copy_from_first, from_first, gather, has_parent, refuse, world_size
from lorakit.errors import LorakitError
from lorakit.model.peft_adapter import content_of, trained_parameters
from lorakit.progress import Progress
from lorakit.train.sharding import Sharding

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Cards that round differently drift apart by the last digits; what is further apart is not the same training.
_ROUNDING = 1e-3


class StopRequest:
    """Set by Ctrl-C, SIGTERM or SIGHUP: the step ends, a checkpoint is written, the run stops. A second one kills. Of
    several processes all stop after the same step, whichever got the signal."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.signal, self._agreed = progress, 0, False

    def __call__(self) -> bool:
        """Whether to stop, as all processes agreed last."""
        return self._agreed if world_size() > 1 else bool(self.signal)

    def agreed(self) -> bool:
        """Whether any process is to stop. All processes ask at once."""
        (self._agreed,) = any_of(self._agreed or bool(self.signal))
        return self._agreed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals, except ignored ones (nohup ignores SIGHUP); only a program's main thread may."""
        is_main = threading.current_thread() is threading.main_thread()
        numbers = [number for number in _STOPS if is_main and signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._received) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.signal and (number == signal.SIGHUP or (number == signal.SIGTERM and has_parent())):
            return  # it follows by itself: systemd sends it after SIGTERM, and a closed terminal more than one
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        self.progress.warn("stopping: this step ends and a checkpoint is written (again to stop at once)")


def keep_equal(model: Any, sharding: Sharding, progress: Progress) -> None:
    """Check that all processes hold the same trained weights, except those that they share out. Where hardware rounds
    differently they go on with the first one's; LorakitError where they are further apart."""
    if world_size() == 1:
        return
    trained = trained_parameters(model).items()
    weights = {name: weight.detach() for name, weight in trained if not sharding.is_shared_out(weight)}
    contents = [content_of(weight) for weight in weights.values()]
    if any_of(contents != from_first(contents)) == (False,):
        return
    own = {name: weight.clone() for name, weight in weights.items()}
    copy_from_first(weights.values())
    apart = {}
    for name, weight in weights.items():
        largest = weight.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)  # a B that no row reached is zero
        apart[name] = float((weight - own[name]).abs().max() / largest)
    most, name = max(gather(max((share, name) for name, share in apart.items())))
    if not most < _ROUNDING:
        message = f"the processes have trained different weights: {name} differs by {most:.1g} of its largest number"
        refuse(
            LorakitError(f"{message}. That is a fault in lorakit or of a device; the last checkpoint is from before.")
        )
    progress.warn(
        f"the devices round differently ({name} by {most:.1g} of its largest number): all go on with rank 0's"
    )
