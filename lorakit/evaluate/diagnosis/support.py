"""Support of answers: whether the figures that a model is to give are in its prompts or its training rows at all."""

from collections.abc import Sequence

from lorakit.data.answers import pairs_of
from lorakit.data.figures import MOST_UNSUPPORTED, TO_RETRIEVAL, measure_figures
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.metric import wilson
from lorakit.evaluate.rendering import RenderedRows

UNSUPPORTED = Finding(
    "unsupported figures",
    unit="share of held-out answers with figures that neither prompt nor training answers give",
    threshold=MOST_UNSUPPORTED,
    why="A figure is a number, a date or a price. One that is in no prompt and no training answer can only be "
    "invented. In the gallery and in GSM8K at most 3 % of the answers have one, to questions for dates and prices 44 "
    "to 100 %. Flagged from a quarter of the answers on, where these are ten: it is counted, not estimated.",
    remedy=f"{TO_RETRIEVAL}.",
)


def measure_support(rendered: RenderedRows, training: Sequence[str]) -> Finding | None:
    """The finding about the last answers of rows, `training` being the answers trained on; None where every
    figure is supported, or there are no answers."""
    support = measure_figures(pairs_of(rendered.rows, rendered.tokenizer, rendered.stop_ids), training)
    if support is None or not support.unsupported:
        return None
    interval = wilson(support.unsupported, support.answers)
    return UNSUPPORTED.measured(
        support.share, support.is_low, interval, {**support.to_dict(), "in words": str(support)}
    )
