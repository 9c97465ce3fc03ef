"""How the benchmarks that papers name are mostly run, and what differs here."""

from collections.abc import Sequence
from typing import NamedTuple

from lorakit.evaluate.benchmarks.task_score import TaskScore


class Published(NamedTuple):
    """`rows` of the test set, `shots` of most figures, and the rows that these are drawn from; 0 if unknown."""

    rows: int
    shots: int
    pool: int = 0


# Rows: the data sets' papers. Shots: the Open LLM Leaderboard of 2023; HumanEval: Chen et al. 2021 (arXiv:2107.03374).
PUBLISHED = {
    "arc_challenge": Published(1172, 25, 1119),
    "gsm8k": Published(1319, 5, 7473),
    "hellaswag": Published(10042, 10),
    "humaneval": Published(164, 0),
    "mmlu": Published(14042, 5),
    "truthfulqa_mc2": Published(817, 0),
    "winogrande": Published(1267, 5),
}


def differences(scores: Sequence[TaskScore], chat: bool) -> list[str]:
    """A sentence for everything in which figures of one model are not comparable with published ones."""
    sentences = []
    for name, published in PUBLISHED.items():
        of_task = [one for one in scores if one.task == name]
        if not of_task:
            continue
        rows = len(of_task[0].rows_of)
        members = [one for one in scores if name in (one.task, one.within) and one.shots is not None]
        if rows < published.rows:
            sentences.append(f"{name}: {rows:,} of its {published.rows:,} rows.")
        shots = sorted({one.shots for one in members if one.shots is not None})
        if shots and shots != [published.shots]:
            here = " to ".join(str(one) for one in dict.fromkeys((shots[0], shots[-1])))
            sentences.append(
                f"{name}: {here} examples in a prompt, where published figures mostly have {published.shots}"
                + (f" (--shots {published.shots})." if published.shots else ".")
            )
        pool = max((one.pool for one in members), default=0)
        if shots and shots[-1] and 0 < pool < published.pool:
            sentences.append(
                f"{name}: examples drawn from {pool:,} rows, where the published set has {published.pool:,}."
            )
    if chat and any(one.task in PUBLISHED for one in scores):
        sentences.append("Prompts are in the chat template; published figures of base models mostly are not.")
    return sentences
