"""What is asked of a benchmark."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BenchmarkSettings:
    """Which tasks to run, and how. `include`: a folder of task files, searched first; they are programs, whose
    templates and `!function`s run. `data`: a folder that has their data sets, None for the hub. `limit`: the first rows
    of every single task, None for all. `shots`: examples in a prompt, None for what each task says. `chat`: put prompts
    into the chat template, few-shot examples as turns. `allow_code`: run what the model writes where a task asks for it
    (HumanEval), confined, and metric scripts of the hub. `seed`: of the intervals; few-shot examples have lm-eval's own
    seeds."""

    tasks: tuple[str, ...]
    include: Path | None = None
    limit: int | None = None
    chat: bool = False
    allow_code: bool = False
    seed: int = 0
    data: Path | None = None
    shots: int | None = None
