"""The cache of examples: named by everything that could change them, built by one process at a time."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from filelock import FileLock, Timeout

import lorakit
from lorakit.data.rendering import ChatTemplate
from lorakit.data.report import Report
from lorakit.data.sources import content_of, shown
from lorakit.errors import LorakitError
from lorakit.folders import cache_folder, remove_drafts, sha256_of, whole_folder
from lorakit.progress import Progress
from lorakit.recipe.problems import shown_path
from lorakit.recipe.schema import Data, Source
from lorakit.tables import FORMATS

Built = tuple[datasets.Dataset, Report]

_CODE = ("cache.py", "encoding.py", "examples.py", "files.py", "rendering.py", "report.py", "sources.py")


def key_of(sources: list[Source], settings: Data, template: ChatTemplate, share: Any) -> str:
    """A name for the examples that changes with anything that could change them.

    Raises:
        UserError: a source cannot be read.
    """
    code = {Path(__file__).with_name(name) for name in _CODE}
    code |= {Path(inspect.getfile(entry.function)) for entry in FORMATS}
    facts = {
        "versions": [lorakit.__version__, transformers.__version__, tokenizers.__version__],
        "code": [sha256_of(path) for path in sorted(code)],
        "sources": [[shown(source), content_of(source), source.format, source.columns] for source in sources],
        "settings": settings.model_dump(include={"max_length", "overlong", "broken"}),
        "tokenizer": tokenizer_sha256(template.tokenizer),
        "template": [template.train_on, template.system, template.stop_words],
        # Some templates write today's date into the system prompt.
        "day": date.today().isoformat() if "strftime_now" in str(template.tokenizer.chat_template) else None,
        "share": asdict(share) if share else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_sha256(tokenizer: Any) -> str:
    """A fingerprint of a tokenizer: its model, its special tokens and its chat template."""
    if tokenizer.is_fast:
        model = tokenizer.backend_tokenizer.to_str()
        model = model[model.index('"added_tokens"') :]  # before it stand padding and truncation, which each use sets
    else:
        model = json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [model, str(tokenizer.special_tokens_map), str(tokenizer.chat_template), type(tokenizer).__name__]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def cached(key: str, build: Callable[[], Built], progress: Progress) -> Built:
    """The examples of this key, built when they are not there or damaged.

    Raises:
        LorakitError: the cache cannot be written.
    """
    folder = cache_folder() / "examples" / key
    try:
        with _alone(folder, progress):
            found = _read(folder, progress)
            if found is None:
                with whole_folder(folder) as draft:
                    rows, report = build()
                    rows.save_to_disk(draft / "rows")
                    (draft / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")
                found = _load(folder)
    except OSError as error:
        raise LorakitError(
            f"{shown_path(folder)}: the cache cannot be written: {error.strerror or error}. Set LORAKIT_CACHE to a "
            "folder that can."
        ) from error
    return found


@contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """While one process builds these examples the others wait, and what a killed one left behind goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say("another process prepares the same examples: waiting for it")
        lock.acquire()
    try:
        remove_drafts(folder.parent, folder.name)
        yield
    finally:
        lock.release()


def _read(folder: Path, progress: Progress) -> Built | None:
    if not folder.exists():
        return None
    try:
        return _load(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        progress.warn(f"the cached examples in {shown_path(folder)} are damaged ({error}): they are made again")
        return None


def _load(folder: Path) -> Built:
    report = Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
    rows = datasets.load_from_disk(str(folder / "rows"))
    if len(rows) != report.kept:
        raise ValueError(f"{len(rows)} of {report.kept} rows")
    return rows, report
