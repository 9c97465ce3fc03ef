"""A run's figures on their way to its trackers, which work in a process of their own (process.py)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any

from lorakit.atomic_io import read_json_object, write_atomic
from lorakit.errors import UserError
from lorakit.progress import Progress
from lorakit.recipe.fields import entry_name, entry_settings
from lorakit.registry import TRACKERS
from lorakit.run_dir import Run
from lorakit.track.process import PATIENCE, SCORES

_SILENCE = 3.0  # seconds that a wait may take without being said
_WHILE_TRAINING = (
    "{name} does not follow this run any more: {reason}. The run does without; log.jsonl has every figure."
)
_AFTERWARDS = "{name} did not get the scores: {reason}. The run's eval/ has them."
_START = "import sys; sys.path[:] = {path!r}; from lorakit.track.process import main; main()"


def refuse_missing_trackers(trackers: Sequence[Any]) -> None:
    """Refuse trackers whose packages are not installed, without importing any."""
    for tracker in trackers:
        name = entry_name(tracker)
        if missing := [module for module in TRACKERS[name].modules if find_spec(module) is None]:
            raise UserError(
                f"track: {name} needs packages that are not installed ({', '.join(missing)}). Install them with "
                f'pip install "lorakit[{name}]", or leave {name} out.'
            )


class Tracking:
    """The trackers of one run, once they are started. No call waits for them but `close`, which has a limit. `lost`:
    what is said of one that fails."""

    def __init__(self, run: Run, progress: Progress, lost: str = _WHILE_TRAINING) -> None:
        self.run, self.progress, self.lost = run, progress, lost
        self.following: set[str] = set()
        self.events: SimpleQueue[str | None] = SimpleQueue()
        self.replies: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self.process: subprocess.Popen[str] | None = None

    def start(self, trackers: Sequence[Any], config: Mapping[str, Any], step: int) -> None:
        """Start the trackers of a recipe, which follow the run from a step on."""
        if not trackers:
            return
        self.following = {entry_name(tracker) for tracker in trackers}
        ids = dict.fromkeys(sorted(self.following)) | tracked_ids(self.run)
        try:  # before they write, so that an overwritten run knows their folders
            self.run.tracking.mkdir(exist_ok=True)
            write_atomic(self.run.tracked, json.dumps(ids, indent=2) + "\n")
        except OSError as error:
            self._lose(f"{self.run.tracked} cannot be written: {error.strerror}")
            return
        described = [self._describe(tracker, ids, step) for tracker in trackers]
        facts: dict[str, Any] = {"name": self.run.recipe_name() or self.run.folder.name, "folder": str(self.run.folder)}
        facts |= {"ids": str(self.run.tracked), "config": config, "step": step, "rows": self.run.read_sampled_rows()}
        self._send(facts | {"trackers": described})
        command = [sys.executable, "-c", _START.format(path=sys.path)]
        pipe, errors = subprocess.PIPE, None if os.environ.get("LORAKIT_DEBUG") else subprocess.DEVNULL
        try:  # in a session of its own: Ctrl-C is the training's
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, start_new_session=True, encoding="utf-8"
            )
        except OSError as error:
            self._lose(f"its process did not start: {error.strerror}")
            return
        for work, stream in ((self._write, self.process.stdin), (self._read, self.process.stdout)):
            Thread(target=work, args=(stream,), daemon=True).start()

    def _describe(self, tracker: Any, ids: Mapping[str, str | None], step: int) -> dict[str, Any]:
        """What the process is told of a tracker; `before`: the figures that one which is new to the run has missed."""
        name, settings = entry_name(tracker), entry_settings(TRACKERS, tracker)
        before = reversed([*self.run.read_log("step")]) if step and not ids[name] else ()
        return {
            "tracker": name,
            "settings": settings.model_dump() if settings else {},
            "folder": str(self.run.tracking / name),
            "id": ids[name],
            "before": [line for line in before if {"loss", "eval_loss", "samples"} & line.keys()],
        }

    def _write(self, stream: IO[str]) -> None:
        with suppress(OSError), stream:  # a process that has ended is noticed where its replies end
            while (line := self.events.get()) is not None:
                stream.write(line)
                if self.events.empty():
                    stream.flush()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.replies.put(json.loads(line))
        self.replies.put(None)

    def _send(self, facts: Mapping[str, Any]) -> None:
        """Hand one document to the process, without waiting for it."""
        self.events.put(json.dumps(facts) + "\n")

    def log(self, figures: Mapping[str, Any]) -> None:
        """Hand the figures of a `step`, or its `samples`, to the trackers, and report what became of them meanwhile."""
        if self.following:
            self._send({name: value for name, value in figures.items() if value is not None})
            while not self.replies.empty():
                self._take(self.replies.get())

    def _take(self, reply: dict[str, Any] | None) -> None:
        if reply is None:
            self._lose("its process ended")
        elif "failure" in reply:
            self._lose(reply["failure"], reply["tracker"])
        elif "closed" in reply:
            self.following.discard(reply["tracker"])
        else:
            self.progress.say(f"{reply['tracker']}: {reply['place']}")

    def _take_until(self, limit: float) -> None:
        """Take what is replied until no tracker follows the run any more; Empty where that takes too long."""
        while self.following:
            self._take(self.replies.get(timeout=max(0.0, limit - time.monotonic())))

    def _lose(self, reason: str, *names: str) -> None:
        for name in names or sorted(self.following):
            self.following.discard(name)
            self.progress.warn(self.lost.format(name=name, reason=reason))

    def close(self, complete: bool) -> None:
        """Wait until the trackers have all figures, as long as they may take; `complete`: whether the run is."""
        self._send({"end": complete})
        self.events.put(None)
        limit = time.monotonic() + PATIENCE
        try:
            with suppress(Empty):
                self._take_until(time.monotonic() + _SILENCE)
            if self.following:
                self.progress.say(f"waiting for {' and '.join(sorted(self.following))} to take the last figures")
            self._take_until(limit)
            if self.process:
                self.process.wait(timeout=max(0.0, limit - time.monotonic()))
        except (Empty, subprocess.TimeoutExpired):
            self._lose(f"it did not take the last figures within {PATIENCE:.0f} seconds")
        finally:
            if self.process:
                with suppress(ProcessLookupError):  # those that a library started are in its group
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def tracked_ids(run: Run) -> dict[str, str]:
    """By which the trackers know a run."""
    known = read_json_object(run.tracked) or {}
    return {name: value for name, value in known.items() if isinstance(value, str) and value}


@contextmanager
def track(run: Run, progress: Progress, lost: str = _WHILE_TRAINING) -> Iterator[Tracking]:
    """Within this trackers, once they are started, follow a run; `lost`: what is said of one that fails."""
    tracking, complete = Tracking(run, progress, lost), False
    try:
        yield tracking
        complete = True
    finally:
        tracking.close(complete)


def track_scores(
    run: Run, trackers: Sequence[Any], scores: Mapping[str, Mapping[str, float]], progress: Progress
) -> None:
    """Send final scores, by model and metric, to those of a recipe's trackers that know the run: in the same tracked
    run, at its last step."""
    known = tracked_ids(run)
    trackers = [tracker for tracker in trackers if entry_name(tracker) in known]
    manifest = run.read_manifest()
    if not trackers or not manifest.get("result"):
        return
    step = manifest["result"]["steps"]
    named = {f"{model}/{metric}": value for model, of in scores.items() for metric, value in of.items()}
    figures = {SCORES + re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII): value for name, value in named.items()}
    with track(run, progress, _AFTERWARDS) as tracking:
        tracking.start(trackers, tracked_config(manifest), step)
        tracking.log({"step": step, **figures})


def tracked_config(manifest: dict[str, Any]) -> dict[str, Any]:
    """What trackers are told of a run before its first step: the resolved recipe, and what its card says besides. The
    manifest of an older run may lack some of it."""

    def some(section: Any, *names: str) -> dict[str, Any]:
        return {name: section[name] for name in names if section and name in section}

    facts = some(manifest, "versions", "machine", "parameters", "steps")
    facts["base"] = some(manifest["base"], "origin", "commit", "quantization")
    for side in ("train", "eval"):
        facts[f"{side}_rows"] = some(manifest["data"].get(side), "kept", "trained_tokens")
    return manifest["recipe"] | {"run": facts}
