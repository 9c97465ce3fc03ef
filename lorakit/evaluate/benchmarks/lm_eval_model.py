"""lm-eval on a model that is in memory already, without its bars, its logging and its prints.

Imports lm-eval (the extra `tasks`): import this module only where a benchmark is run.
"""

import copy
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import datasets
import evaluate as metric_scripts
import huggingface_hub
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from lorakit.progress import Bar, Progress

# lm-eval's own defaults, so that the drawn examples are those of its command line.
_SEED_PYTHON, _SEED = 0, 1234
_BATCH_SIZE = 8
_CODE_CONSENT = "HF_ALLOW_CODE_EVAL"
_MODULES_WITH_BARS = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
# Every model in memory, and every run without a chat template, is warned of these.
_USELESS_WARNINGS = ("`pretrained` model kwarg is not of type", "Passed an already-initialized model")


class LmEvalModel(HFLM):
    """lm-eval's model around one in memory, whose requests lorakit's progress counts."""

    def __init__(
        self, model: Any, tokenizer: Any, variables: Mapping[str, Any] | None, label: str, progress: Progress
    ) -> None:
        # lm-eval ties the weights again of a model that it is given, which breaks a head trained beside an adapter.
        model.tie_weights = lambda: None
        try:
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives one without a padding token such a token
                batch_size=_BATCH_SIZE,
                softmax_dtype="float32",
                chat_template_args=dict(variables or {}),
            )
        finally:
            del model.tie_weights
        self._label, self._progress = label, progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the most likely one."""
        with self._count("likelihoods", requests):
            return super().loglikelihood(requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text."""
        with self._count("texts", requests):
            return super().loglikelihood_rolling(requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt."""
        with self._count("answers", requests):
            return super().generate_until(requests)

    @contextmanager
    def _count(self, what: str, requests: list[Any]) -> Iterator[None]:
        with self._progress.bar(f"{self._label}: {what}", total=len(requests)) as bar:
            self.set_cache_hook(_Counter(bar))
            yield


class _Counter:
    """Counts the answers that lm-eval hands to its cache."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self._bar.advance()


def run_lm_eval(lm_eval_model: LmEvalModel, loaded: Any, limit: int | None, chat: bool, allow_code: bool) -> Any:
    """lm-eval's results, with every sample, on the tasks that its TaskManager loaded.

    `evaluate` and not `simple_evaluate`, which asks git, pip and the hub about this machine and this model.
    """
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    random.seed(_SEED_PYTHON)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    consent = os.environ.get(_CODE_CONSENT)
    os.environ[_CODE_CONSENT] = "1" if allow_code else "0"  # asked for by the library that runs generated code
    try:
        return evaluate(
            lm=lm_eval_model,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=allow_code,
        )
    finally:
        del os.environ[_CODE_CONSENT]
        if consent is not None:
            os.environ[_CODE_CONSENT] = consent


@contextmanager
def quiet_lm_eval(progress: Progress) -> Iterator[None]:
    """Bars off, lm-eval's prints to standard error, and its warnings, one of a kind, to the user.

    Telemetry is off too: datasets reports each data set that is read, a local file too, unless it is offline.
    """
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = metric_scripts.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.disable_progress_bars()
    bars = [(module, module.tqdm) for module in _MODULES_WITH_BARS]
    logger, handler = logging.getLogger("lm_eval"), _WarningHandler(progress)
    level, propagate = logger.level, logger.propagate
    try:
        for module, tqdm in bars:
            module.tqdm = _without_bar(tqdm)
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = level, propagate
        for module, tqdm in bars:
            module.tqdm = tqdm


def _without_bar(tqdm: Any) -> Any:
    return lambda *given, **options: tqdm(*given, **{**options, "disable": True})


class _WarningHandler(logging.Handler):
    """Passes on the first warning from each place in lm-eval: most of them come once a row."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress
        self._seen: set[tuple[str, int]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text, place = record.getMessage(), (record.pathname, record.lineno)
        if place not in self._seen and not text.startswith(_USELESS_WARNINGS):
            self._seen.add(place)
            self._progress.warn(f"lm-eval: {' '.join(text.split())[:300]}")
