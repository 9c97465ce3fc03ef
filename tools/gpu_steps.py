"""Run a training command in this process, and write when each of its steps ended, its losses and its peak memory.

    gpu_steps.py FILE MODULE ARGUMENT...      `python -m MODULE ARGUMENT...`, where transformers' Trainer trains

The same for lorakit and for what it is compared with: the device is waited for at the end of each step, and its memory
is counted from the first step on, without the loading before.
"""

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from transformers import TrainerCallback


class StepTimes(TrainerCallback):
    """Writes what it saw when the training ends."""

    file: Path

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []
        self.loading = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            self.loading = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        found: dict[str, Any] = {"times": self.times, "losses": self.losses}
        if torch.cuda.is_available():
            found["peak"], found["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            found["peak_before"] = self.loading
        self.file.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    StepTimes.file = Path(sys.argv[1])
    transformers.trainer.DEFAULT_CALLBACKS.append(StepTimes)
    module, sys.argv = sys.argv[2], sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
