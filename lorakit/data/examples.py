"""Examples: the rows of a recipe's sources, rendered, encoded, checked, split and counted, and cached by content: named
by everything that could change them, built by one process at a time."""

import hashlib
import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import tokenizers
import transformers
from filelock import FileLock, Timeout

import lorakit
from lorakit.atomic_io import atomic_dir, cache_folder, remove_drafts, sha256_of
from lorakit.checksums import find_damage, write_checksums
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.dataset import SIDES, Examples, count_examples, index_of, read_side, write_side
from lorakit.data.example_arrays import TextLengths, UsableRows
from lorakit.data.filter_and_split import remove_leaks, select_rows
from lorakit.data.pipeline import run_pipeline
from lorakit.data.report import Report
from lorakit.data.sources import all_sources, source_hashes, source_name, sources_of
from lorakit.data.template_source import writes_date
from lorakit.data.worker import Rules
from lorakit.errors import LorakitError, UserError
from lorakit.progress import Progress, report_hub_retries
from lorakit.recipe.fields import is_split
from lorakit.recipe.problem import show_path
from lorakit.recipe.schema import Clean, Data, Source
from lorakit.registry import FORMATS

Built = TypeVar("Built")

# The checks that look at one row alone; the others compare rows.
ROW_CHECKS = ("encoding", "html", "noise", "trivial", "special_tokens")
# What changes how a row is read is told by every command, though it only reports.
_ALWAYS = ("special_tokens",)


def examples_of(
    settings: Data, template: ChatTemplate, progress: Progress, survey: bool = False, stored: bool = True
) -> tuple[Examples, Examples | None]:
    """The examples that a recipe trains on, and those that it never trains on (None when it names none), from the cache
    when nothing that matters has changed. `survey`: the checks that only report are made too, and what they need is
    kept in `traits`. `stored`: whether they go into the cache; else their `rows` are gone on return. A `UserError`
    where a source cannot be read, the recipe says to stop at a row or at what a check found, or nothing is left."""
    share: Any = settings.eval if is_split(settings.eval) else None
    rules = rules_of(settings, share, survey)
    with report_hub_retries(progress), nullcontext() if stored else TemporaryDirectory() as folder:

        def prepare(sources: list[Source]) -> tuple[Examples, Examples | None]:
            own = Path(mkdtemp(dir=folder)) if folder else None
            return _prepare(sources, settings.clean, rules, template, progress, own)

        train, held_out = prepare(sources_of(settings, settings.train))
        if settings.eval is not None and share is None:
            held_out, _ = prepare(sources_of(settings, settings.eval))
            train = remove_leaks(train, held_out, settings.clean)
    return train, held_out


def held_out_of(settings: Data, template: ChatTemplate, progress: Progress) -> Examples | None:
    """The second of `examples_of` without reading the rows that are trained on, where they lie apart; raises as it."""
    if settings.eval is None or is_split(settings.eval):
        return examples_of(settings, template, progress)[1]
    sources, rules = sources_of(settings, settings.eval), rules_of(settings, None, False)
    return _prepare(sources, settings.clean, rules, template, progress, None)[0]


def rules_of(settings: Data, share: float | int | None, survey: bool) -> Rules:
    """What holds for every row, and how much has to be known of each. `share`: what is held out of the rows, or how
    many of them."""
    acting = ("fix", "error", "report") if survey else ("fix", "error")
    actions = {check: getattr(settings.clean, check) for check in type(settings.clean).model_fields}
    wanted = {check for check, action in actions.items() if action in acting or (check in _ALWAYS and action != "off")}
    compared = settings.eval is not None and share is None  # with other files, which are prepared by themselves
    apart = share is not None and actions["near_leakage"] != "off"  # near-duplicates stay on one side of the split
    leaks = compared and actions["leakage"] != "off"
    return Rules(
        max_length=settings.max_length,
        overlong=settings.overlong,
        broken=settings.broken,
        share=share,
        checks={check: actions[check] for check in ROW_CHECKS if check in wanted},
        traits=leaks or bool(wanted & {"duplicates", "contradictions", "style"}),
        near=apart or "near_duplicates" in wanted or (compared and "near_leakage" in wanted),
        style="style" in wanted,
        apart=apart,
    )


def file_sha256s(settings: Data, held_out_only: bool = False) -> dict[str, str]:
    """The sha256 of every data file that the recipe names, by path; a hub dataset's fingerprint by its id and split."""
    sources = sources_of(settings, settings.eval) if held_out_only else all_sources(settings)
    return {name: content for source in sources for name, content in source_hashes(source).items()}


def _prepare(
    sources: list[Source], clean: Clean, rules: Rules, template: ChatTemplate, progress: Progress, own: Path | None
) -> tuple[Examples, Examples | None]:
    """The two sides of some sources, from the cache or, for a single use, in a folder of their `own`."""
    key = "" if own else _key_of(sources, rules, clean, template)

    def build(folder: Path) -> None:
        result = run_pipeline(sources, template, rules, folder / "all.arrow", progress)
        selection = select_rows(result, clean, rules, [source.take for source in sources])
        for side, name in enumerate(SIDES[: 1 if rules.share is None else 2]):
            rows = selection.stay & (selection.held_out == bool(side))
            report = _report(result, rows, side)
            if not rows.any():
                raise UserError(_nothing_left(sources, report, rules, side))
            write_side(folder, name, result, rows, report)
        np.savez(folder / "shapes.npz", **vars(result.text_lengths))
        result.path.unlink()

    def load(folder: Path) -> tuple[Examples, Examples | None]:
        with np.load(folder / "shapes.npz", allow_pickle=False) as arrays:
            train = replace(read_side(folder, SIDES[0], key), text_lengths=TextLengths(**arrays))
        return train, None if rules.share is None else read_side(folder, SIDES[1], key)

    if own is None:
        return _cached(key, build, load, progress)
    build(own)
    return load(own)


def _report(result: UsableRows, rows: np.ndarray, side: int) -> Report:
    """The report of one side. `rows`: a mask of those that stay on it."""
    report, examples = result.reports[side], rows[result.owner]
    count_examples(report, index_of(result).select(examples, rows))
    report.read = report.used + report.dropped.total + report.passed_over
    report.cut = int((result.cut & rows).sum())
    report.several = int((np.bincount(result.owner[examples], minlength=1) > 1).sum())
    report.notes = _count_of_each(result.notes, rows)
    report.tasks = _count_of_each(result.tasks, rows)
    report.stop_tokens = [stop for stop, _ in result.stops.most_common()]
    return report


def _count_of_each(numbers: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, int]:
    """How many of the rows of each word stay. `rows`: a mask of those that do."""
    return {word: int(rows[own].sum()) for word, own in numbers.items() if rows[own].any()}


def _nothing_left(sources: list[Source], report: Report, rules: Rules, side: int) -> str:
    names = ", ".join(map(source_name, sources))
    if report.dropped.total and report.read == report.dropped.total:
        longer = any(reason.startswith("longer than") for reason in report.dropped.counts)
        remedy = " Raise data.max_length, or write data.overlong: truncate." if longer else ""
        return f"{names}: no rows left ({report.read:,} read): {'; '.join(report.dropped.lines())}.{remedy}"
    if rules.share is None and report.passed_over:
        return f"{names}: take leaves none of {report.read:,} rows. Write a larger share, or a number of rows."
    if rules.share is None:
        return f"{names}: no rows left ({report.read:,} read)."
    left = "is held out" if side else "is left to train on"
    alike = " or write data.clean.near_leakage: off where rows are alike on purpose," if rules.apart else ""
    return f"{names}: with data.eval: {rules.share:g} no row {left}. Give more rows,{alike} or a file of held-out rows."


def _key_of(sources: list[Source], rules: Rules, clean: Clean, template: ChatTemplate) -> str:
    """A name for the examples that changes with anything that could change them."""
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


def _cached(key: str, build: Callable[[Path], None], load: Callable[[Path], Built], progress: Progress) -> Built:
    """What `load` makes of the cache's folder of this key, which `build` fills when it is not there or damaged: one
    process at a time, and what a killed one left behind goes."""
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
            examples = _read_cached(folder, load, progress) if folder.exists() else None
            if examples is None:
                with atomic_dir(folder) as draft:
                    build(draft)
                    write_checksums(draft)
                examples = load(folder)
    except OSError as error:
        what = f"the cache cannot be written: {error.strerror or error}"
        raise LorakitError(f"{show_path(folder)}: {what}. Set LORAKIT_CACHE to a folder that can.") from error
    return examples


def _read_cached(folder: Path, load: Callable[[Path], Built], progress: Progress) -> Built | None:
    try:
        if damage := find_damage(folder):
            raise ValueError(damage)
        return load(folder)
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
        progress.warn(f"the cached examples in {show_path(folder)} are damaged ({error}): they are made again")
        return None
