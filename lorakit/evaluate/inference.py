"""Running one model on the rows: its losses, answers and likelihoods of labels, computed or from the cache.

What models computed is kept by content: nothing is computed twice, and an interrupted evaluation goes on. The cache has
a file of JSON lines for each model and kind of result, named by the sha256 of all that decides the result. A line for
each row, named by the sha256 of its tokens, with a checksum. Lines are added and flushed after each batch.

Several processes share the missing rows of a model. The first one alone reads and writes the cache.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

import lorakit
from lorakit.atomic_io import cache_folder
from lorakit.checksums import decode_line, encode_line
from lorakit.distributed.processes import from_first, is_first, together, world_size
from lorakit.distributed.sharing import share_out
from lorakit.errors import LorakitError
from lorakit.evaluate import llama_cpp_forward
from lorakit.evaluate.classification import Labels
from lorakit.evaluate.forward import label_loglikelihoods, row_losses
from lorakit.evaluate.models import EvalModelSpec
from lorakit.evaluate.rendering import RenderedRows, Row
from lorakit.model.block_code import use_inference_code
from lorakit.model.generation import Answer, greedy_answers
from lorakit.model.llama_cpp import GgufModel
from lorakit.model.load import load_model
from lorakit.model.peft_adapter import SharedBase
from lorakit.progress import Progress

_VERSION = 2
"""Raise it when older lines may hold wrong figures: they are then not read any more."""

# Missing rows that each process computes before all of them are stored: a large batch of answers on a GPU, twice.
_ROUND = 512

Save = Callable[[Mapping[int, Any]], None]
"""Saves values by the position of their key among the missing ones."""


@dataclass
class CacheFile:
    """The values of one file by the sha256 of their row. Without a path nothing is written."""

    path: Path | None
    lines: dict[str, Any] = field(default_factory=dict)

    def add(self, values: Mapping[str, Any]) -> None:
        """Add values; they are on disk when this returns."""
        self.lines |= values
        if self.path is None or not values:
            return
        text = "".join(encode_line([name, value]) + "\n" for name, value in values.items())
        with _writing(self.path), self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def open_cache(kind: str, facts: Mapping[str, Any], use: bool = True) -> CacheFile:
    """The file of these facts in the cache's folder for a `kind`. With `use` False nothing is read or written."""
    if not use:
        return CacheFile(None)
    versions = {package.__name__: package.__version__ for package in (lorakit, torch, transformers)}
    path = cache_folder() / kind / f"{digest({**facts, **versions, 'version': _VERSION})}.jsonl"
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.is_file() else b""
        if data and not data.endswith(b"\n"):  # a killed process left half a line, which must not spoil the next
            with path.open("ab") as file:
                file.write(b"\n")
    lines: dict[str, Any] = {}
    for line in data.splitlines():
        try:
            name, value = decode_line(line)
        except (ValueError, TypeError):
            continue  # cut short by a crash, or changed since: its row is computed again
        lines[name] = value
    return CacheFile(path, lines)


def digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LorakitError(
            f"{path.parent}: the cache cannot be written: {error.strerror or error}. Set LORAKIT_CACHE to a folder "
            "that can, or write --no-cache."
        ) from error


class ForwardPasses(NamedTuple):
    """What runs models of one kind on rows: three functions that take the same arguments for every kind."""

    row_losses: Callable[..., np.ndarray]
    greedy_answers: Callable[..., list[Answer]]
    label_loglikelihoods: Callable[..., np.ndarray]


def forward_passes(spec: EvalModelSpec) -> ForwardPasses:
    """What runs a model of this kind. This and `ModelLoader` alone know the kinds apart."""
    if spec.gguf:
        of_llama = llama_cpp_forward
        return ForwardPasses(of_llama.row_losses, of_llama.greedy_answers, of_llama.label_loglikelihoods)
    return ForwardPasses(row_losses, greedy_answers, label_loglikelihoods)


@dataclass
class ModelLoader:
    """Keeps one base in memory and puts adapters on it, or one GGUF file."""

    device: str
    _key: tuple[Any, ...] | None = field(default=None, repr=False)
    _base: SharedBase | GgufModel | None = field(default=None, repr=False)

    def model_of(self, spec: EvalModelSpec) -> Any:
        """The model in evaluation mode; the one before it is not usable any more."""
        if self._base is None or self._key != spec.base_key:
            if isinstance(self._base, GgufModel):
                self._base.close()
            self._base = None  # free its memory before the next one is read
            self._base = self._load(spec)
            self._key = spec.base_key
        return self._base if isinstance(self._base, GgufModel) else self._base.model_with(spec.adapter)

    def _load(self, spec: EvalModelSpec) -> SharedBase | GgufModel:
        if spec.gguf:
            positions = spec.gguf.header.positions
            return GgufModel(spec.gguf.path, limit=positions.limit if positions and positions.hard else None)
        return SharedBase(lambda: load_model(*spec.loaded, self.device))


def loading_order(specs: Sequence[EvalModelSpec]) -> list[int]:
    """The numbers of the models, so that each base is loaded once, and scored before any adapter was on it."""
    keys = [spec.base_key for spec in specs]
    return sorted(range(len(specs)), key=lambda at: (keys.index(keys[at]), specs[at].adapter is not None, at))


@dataclass(frozen=True, eq=False)
class EvalModel:
    """A model to run on rows. `cache` is whether to use the cache."""

    spec: EvalModelSpec
    rendered: RenderedRows
    loader: ModelLoader
    cache: bool
    progress: Progress

    def compute(
        self,
        kind: str,
        facts: Mapping[str, Any],
        rows: Sequence[Any],
        work: Callable[[Any, list[int], Save], None],
        tokens: Callable[[Any], int] = len,
    ) -> list[Any]:
        """A value of each row, from the cache or by `work`. `rows` are plain data that decides the value, `facts` what
        else does. `work` gets the model, numbers of missing rows, and what saves values by position among these. The
        processes share the missing rows by their number of `tokens`; what runs on no torch is the first one's."""
        keys = [digest(row) for row in rows]
        file = self._open_cache(kind, facts, keys)
        missing = list({key: at for at, key in enumerate(keys) if key not in file.lines}.values())

        def compute_rows(some: list[int], share: list[int]) -> list[Any]:
            numbers, model = [some[at] for at in share], self.loader.model_of(self.spec)
            with nullcontext() if self.spec.gguf else use_inference_code(model), torch.inference_mode():
                work(model, numbers, lambda values: file.add({keys[numbers[at]]: one for at, one in values.items()}))
            return [file.lines[keys[number]] for number in numbers]

        at_once = _ROUND * world_size() if world_size() > 1 else max(len(missing), 1)
        for some in (missing[start : start + at_once] for start in range(0, len(missing), at_once)):
            costs, takes_part = [tokens(rows[number]) for number in some], is_first() or not self.spec.gguf
            values = share_out(costs, partial(compute_rows, some), takes_part)
            computed = {keys[number]: value for number, value in zip(some, values, strict=True)}
            file.add({key: value for key, value in computed.items() if key not in file.lines})
        return [file.lines[key] for key in keys]

    def _open_cache(self, kind: str, facts: Mapping[str, Any], keys: Sequence[str]) -> CacheFile:
        """The file of the cache on the first process; what it has of these keys, without a path, on the others."""

        def open_file() -> CacheFile:
            return open_cache(kind, {**self.spec.identity(self.loader.device), **facts}, self.cache)

        file = together(lambda: open_file() if is_first() else CacheFile(None))
        lines = from_first({key: file.lines[key] for key in keys if key in file.lines})
        return file if is_first() else CacheFile(None, lines)


def compute_losses(eval_model: EvalModel, rows: Sequence[Row]) -> np.ndarray:
    """The loss summed over the trained tokens of each row (rows,), in nats."""
    pad, note, progress = eval_model.rendered.pad, f"{eval_model.spec.name}: loss", eval_model.progress
    passes = forward_passes(eval_model.spec)

    def work(model: Any, missing: list[int], save: Save) -> None:
        passes.row_losses(model, [rows[at] for at in missing], pad, note, progress, save)

    plain = [[list(row["input_ids"]), list(row["labels"])] for row in rows]
    return np.array(eval_model.compute("losses", {}, plain, work, lambda row: len(row[0])), dtype=float)


def generate_answers(eval_model: EvalModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
    stop_ids, pad, note = eval_model.rendered.stop_ids, eval_model.rendered.pad, f"{eval_model.spec.name}: answers"
    passes = forward_passes(eval_model.spec)

    def work(model: Any, missing: list[int], save: Save) -> None:
        chosen, last = [prompts[at] for at in missing], time.monotonic()

        def save_timed(answers: Mapping[int, Answer]) -> None:
            nonlocal last
            now = time.monotonic()
            seconds, last = round((now - last) / max(len(answers), 1), 4), now
            save({number: one._replace(seconds=seconds) for number, one in answers.items()})

        passes.greedy_answers(model, chosen, stop_ids, max_new_tokens, pad, note, eval_model.progress, save_timed)

    if not prompts:
        return []
    decoding = {"decoding": "greedy", "max_new_tokens": max_new_tokens, "stops": stop_ids}
    lines = eval_model.compute("answers", decoding, list(map(list, prompts)), work)
    # The cache of an earlier version has no seconds.
    return [Answer(tuple(tokens), bool(ended), *seconds) for tokens, ended, *seconds in lines]


def compute_likelihoods(eval_model: EvalModel, labels: Labels) -> np.ndarray:
    """The log-probability of each label after each of the labels' prompts (rows, labels), in nats."""
    rendered, note = eval_model.rendered, f"{eval_model.spec.name}: labels"
    passes = forward_passes(eval_model.spec)
    prompts = [rendered.rows[row]["input_ids"][: rendered.rows[row]["answer"]] for row in labels.rows]

    def work(model: Any, missing: list[int], save: Save) -> None:
        chosen = [prompts[at] for at in missing]
        values = passes.label_loglikelihoods(model, chosen, labels.tokens, rendered.pad, eval_model.progress, note)
        save(dict(enumerate(values.tolist())))

    facts = {"labels": labels.tokens}
    return np.array(eval_model.compute("labels", facts, list(map(list, prompts)), work), dtype=float)
