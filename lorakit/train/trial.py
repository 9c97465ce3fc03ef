"""What a trial before a run works on, and how it leaves the model as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lorakit.data.rows import IGNORED
from lorakit.hardware.accelerator import restoring_random_states
from lorakit.train.micro_batching import MicroBatchRunner

# Tokens of each row that are tried: enough to tell, and little memory however long the rows are.
_TRIED = 128


@contextmanager
def restoring_modes(runner: MicroBatchRunner) -> Iterator[None]:
    """Training mode within; modes, gradients and random generators afterwards as before."""
    model, device = runner.model, runner.device
    modes = [(module, module.training) for module in model.modules()]
    with restoring_random_states(device):
        model.train()
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for module, training in modes:
                module.training = training


def two_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two short rows of different lengths, so that one is padded."""
    two = [_excerpt(row) for row in sorted(rows, key=lambda row: len(row["input_ids"]))[:2]]
    first, last = two[0], two[-1]
    if len(first["input_ids"]) == len(last["input_ids"]):
        last = {**last, **{name: last[name][:-1] for name in ("input_ids", "labels")}}
    return [first, last]


def _excerpt(row: dict[str, Any]) -> dict[str, Any]:
    """A row, of a long one the tokens around the first that are trained."""
    first = next((at for at, label in enumerate(row["labels"]) if label != IGNORED), 0)
    begin = max(0, min(first - _TRIED // 2, len(row["input_ids"]) - _TRIED))
    return row | {name: row[name][begin : begin + _TRIED] for name in ("input_ids", "labels")}
