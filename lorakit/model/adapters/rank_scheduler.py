"""What an adapter kind may need besides a PEFT configuration: data to start from, and a hand in every step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from lorakit.progress import Progress


@dataclass(frozen=True)
class InitContext:
    """What the initialization of an adapter may ask for."""

    batches: Callable[[], Iterator[dict[str, Any]]]
    """The batches of the first epoch, in training order: input_ids, attention_mask and labels, each (rows, tokens)."""
    originals: Callable[[list[str]], dict[str, Any]]
    """Module paths -> the weights (out, in) that lie on disk for them, before any quantization."""
    progress: Progress


class RankScheduler(Protocol):
    """What some kinds do while they train. Steps count from 1."""

    settled_at: int
    """The step from which the adapter has the shape that was asked for: earlier ones are no result."""

    def penalty(self) -> Any:
        """A scalar that is added to the loss of every step, with its gradient."""

    def after_step(self, step: int, optimizer: Any) -> None:
        """Called when the optimizer has made `step`, while the gradients are still there."""

    def state(self) -> dict[str, Any]:
        """Tensors by name that the next steps depend on, besides the trained weights."""

    def restore(self, state: dict[str, Any], weights: dict[str, Any]) -> None:
        """Take up a `state` again, and give trained parameters the shapes that they have in `weights`."""
