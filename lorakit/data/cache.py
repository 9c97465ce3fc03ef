"""The cache of examples: named by everything that could change them, built by one process at a time."""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import tokenizers
import transformers
from filelock import FileLock, Timeout

import lorakit
from lorakit.atomic_io import atomic_dir, cache_folder, remove_drafts, sha256_of
from lorakit.checksums import find_damage, write_checksums
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.sources import source_hashes, source_name
from lorakit.data.template_source import writes_date
from lorakit.data.worker import Rules
from lorakit.errors import LorakitError
from lorakit.progress import Progress
from lorakit.recipe.problem import show_path
from lorakit.recipe.schema import Clean, Source
from lorakit.registry import FORMATS

Built = TypeVar("Built")


def key_of(sources: list[Source], rules: Rules, clean: Clean, template: ChatTemplate) -> str:
    """A name for the examples that changes with anything that could change them.

    Raises:
        UserError: a source cannot be read.
    """
    code = {*Path(__file__).parent.rglob("*.py"), *(Path(inspect.getfile(entry.function)) for entry in FORMATS)}
    facts = {
        "versions": [lorakit.__version__, transformers.__version__, tokenizers.__version__],
        "code": [sha256_of(path) for path in sorted(code)],
        "sources": [[source_name(one), source_hashes(one), one.model_dump(exclude={"path"})] for one in sources],
        "rules": asdict(rules),
        "clean": clean.model_dump(),
        "tokenizer": tokenizer_sha256(template.tokenizer),
        "template": [template.train_on, template.stop_words, template.variables],
        # Some templates write today's date into the system prompt.
        "day": (template.date or date.today().isoformat()) if writes_date(template.tokenizer.chat_template) else None,
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
    parts += ["split_special_tokens"] if getattr(tokenizer, "split_special_tokens", False) else []
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def cached(key: str, build: Callable[[Path], None], load: Callable[[Path], Built], progress: Progress) -> Built:
    """What `load` makes of the cache's folder of this key, which `build` fills when it is not there or damaged. While
    one process builds it the others wait, and what a killed one left behind goes.

    Raises:
        LorakitError: the cache cannot be written.
    """
    folder = cache_folder() / "examples" / key
    lock = FileLock(folder.with_name(f"{key}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            acquired = lock.acquire(timeout=0)
        except Timeout:
            progress.say("another process prepares the same examples: waiting for it")
            acquired = lock.acquire()
        with acquired:
            remove_drafts(folder.parent, folder.name)
            examples = _read(folder, load, progress) if folder.exists() else None
            if examples is None:
                with atomic_dir(folder) as draft:
                    build(draft)
                    write_checksums(draft)
                examples = load(folder)
    except OSError as error:
        raise LorakitError(
            f"{show_path(folder)}: the cache cannot be written: {error.strerror or error}. Set LORAKIT_CACHE to a "
            "folder that can."
        ) from error
    return examples


def _read(folder: Path, load: Callable[[Path], Built], progress: Progress) -> Built | None:
    try:
        if damage := find_damage(folder):
            raise ValueError(damage)
        return load(folder)
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
        progress.warn(f"the cached examples in {show_path(folder)} are damaged ({error}): they are made again")
        return None
