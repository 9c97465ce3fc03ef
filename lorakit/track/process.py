"""The process of the trackers: it reads what a run logs on standard input and hands it to the libraries.

It is a process of its own so that nothing in a library can stop or slow the training: not an import, a network that
does not answer, a thread that holds Python, nor what is done when a program ends. Each tracker has a thread. A line
of JSON on standard output says what became of one.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread, Timer
from types import SimpleNamespace
from typing import Any

from lorakit.atomic_io import read_json_object, write_atomic
from lorakit.errors import first_line
from lorakit.registry import TRACKERS
from lorakit.track.trackers import OpenRun, TrackedRun, without_credentials

PATIENCE = 60.0
"""How many seconds a tracker has for what is left, after the run has ended."""

SCORES = "eval_scores/"
"""How the names of final scores begin, which may be measured again."""

Event = dict[str, Any]
_noting = Lock()


class _Arguments(SimpleNamespace):
    """transformers' training arguments as its callbacks read them, with the run's configuration in their place."""

    def __init__(self, config: dict[str, Any], **given: Any) -> None:
        from transformers import TrainingArguments

        defaults = {field.name: field.default for field in fields(TrainingArguments)}
        super().__init__(**defaults | given)
        self._config = config

    def to_dict(self) -> dict[str, Any]:
        return self._config

    def to_json_string(self) -> str:
        return json.dumps(self._config, indent=2, ensure_ascii=False)


def main() -> None:
    """Follow the run whose description is the first line, until its end."""
    os.nice(5)  # the training comes first
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print
    _import_callbacks()
    writing = Lock()

    def reply(tracker: str, **facts: Any) -> None:
        with writing, suppress(BrokenPipeError):  # a training that was killed reads none
            replies.write(json.dumps({"tracker": tracker, **facts}) + "\n")
            replies.flush()

    if not (first := sys.stdin.readline()):
        return
    start = json.loads(first)
    followers = []
    for one in start["trackers"]:
        events: SimpleQueue[Event] = SimpleQueue()
        thread = Thread(target=_follow, args=(start, one, events, partial(reply, one["tracker"])), daemon=True)
        thread.start()
        followers.append((thread, events))
    for line in chain(sys.stdin, [json.dumps({"end": False})]):  # the last one for a training that was killed
        for _, events in followers:
            events.put(json.loads(line))
    limit = Timer(PATIENCE, os._exit, [1])
    limit.daemon = True
    limit.start()
    for thread, _ in followers:
        thread.join()


def _import_callbacks() -> None:
    """Import transformers' callbacks without torch, which they do not need: 60 MB of memory instead of 440."""
    blocked: Any = None
    sys.modules["torch"] = blocked
    import transformers.integrations.integration_utils  # noqa: F401
    from transformers import TrainerControl, TrainingArguments  # noqa: F401

    del sys.modules["torch"]


def _follow(start: Event, one: Event, events: "SimpleQueue[Event]", reply: Callable[..., None]) -> None:
    """Hand what the run logs to one tracker."""
    try:
        opened = _open(start, one)
        _note_id(Path(start["ids"]), one["tracker"], opened.id)
        reply(place=opened.place)
        _log_until_end(opened, start, chain(one["before"], iter(events.get, None)))
        reply(closed=True)
    except BaseException as error:  # also what a library raises to end the program
        reply(failure=without_credentials(first_line(error)))


def _note_id(file: Path, tracker: str, identity: str) -> None:
    """Keep by what a tracker knows the run, for when the run goes on: also of a training that was killed meanwhile."""
    with _noting:
        write_atomic(file, json.dumps((read_json_object(file) or {}) | {tracker: identity}, indent=2) + "\n")


def _open(start: Event, one: Event) -> OpenRun:
    spec = TRACKERS[one["tracker"]]
    tracked = TrackedRun(start["name"], Path(one["folder"]), one["id"], start["step"], os.getppid())
    settings = [spec.settings(**one["settings"])] if spec.settings else []
    return spec.function(*settings, tracked)


def _log_until_end(opened: OpenRun, start: Event, events: Iterable[Event]) -> None:
    from transformers import TrainerControl, TrainerState

    given = {"run_name": start["name"], "output_dir": start["folder"], **opened.arguments}
    callback, arguments, control = opened.callback, _Arguments(start["config"], **given), TrainerControl()
    callback.on_train_begin(arguments, TrainerState(global_step=start["step"]), control, model=None)
    for event in events:
        state = TrainerState(global_step=event.get("step", start["step"]), epoch=event.get("epoch"))
        if "end" in event:
            callback.on_train_end(arguments, state, control, model=None)
            opened.close(event["end"])
            return
        if samples := event.get("samples"):
            rows = chain(start["rows"], repeat({}))  # of a run that goes on with fewer
            opened.log_samples(state.global_step, [row | one for row, one in zip(rows, samples, strict=False)])
            continue
        last = opened.last_steps
        is_new = {name: state.global_step > last.get(name, -1) or name.startswith(SCORES) for name in event}
        logs = {name: value for name, value in event.items() if name != "step" and is_new[name]}
        if logs:
            callback.on_log(arguments, state, control, logs=logs, model=None)
