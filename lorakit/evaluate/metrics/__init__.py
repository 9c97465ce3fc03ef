"""Metrics of generated answers: answer and reference -> scores by name.

A metric is a plain function of two texts, the generated answer and the reference, that returns `{suffix: score}`; the
empty suffix is the metric itself, another one becomes `metric.suffix`. A score is averaged over the rows that have it:
return `{}` for a row to which the metric does not apply. `MetricSpec` in lorakit/registry.py has what an entry may say
besides: a unit, settings (then the last argument of the function), `batched` for a function of all answers and all
references that returns one mapping per row, and `pool` for a score that is no mean over rows: a row's values are then
sequences of statistics, and `pool` makes the score of their sums, an array (..., statistics) -> (...).

The recipe reads this table: torch, numpy and the libraries are imported when a function is called.
"""

import importlib

# The order is that of the table: documents and messages name them so.
for _name in ("matching", "similarity", "stylometry", "json_answers", "tool_calls"):
    importlib.import_module(f"lorakit.evaluate.metrics.{_name}")
