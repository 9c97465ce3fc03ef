"""Metrics of generated answers: answer and reference -> scores by name.

A metric is a plain function of two texts, the generated answer and the reference, that returns `{suffix: score}`; the
empty suffix is the metric itself, another one becomes `metric.suffix`. A score is averaged over the rows that have it,
so a row to which a metric does not apply returns `{}`. The facts of an entry, all optional:

- `unit`: how the score is written, a key of `lorakit.evaluate.metric.UNITS`; "share" (from 0 to 1) unless said;
- `higher`: True where more is better (the default), False where less is, None where neither is;
- `settings`: the Section of the metric's settings, which are then the last argument; `mistakes(settings)`: what cannot
  work in them, as (key path, reason, remedy);
- `together`: True for a function of all answers and all references that returns one mapping a row, where something is
  to be prepared once or computed in batches;
- `pool`: for a score that is no mean over rows. A row's values are then sequences of statistics, and `pool` makes the
  score of their sums over rows: an array (..., statistics) -> (...).

The recipe reads this table: torch, numpy and the libraries are imported when a function is called.
"""

import importlib

# The order is that of the table: documents and messages name them so.
for _name in ("matching", "numbers", "overlap", "whole_text", "json_answers"):
    importlib.import_module(f"lorakit.evaluate.metrics.{_name}")
