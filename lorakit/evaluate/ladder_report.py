"""A quality ladder as a table, as a sentence, and as the part of the evaluation's document that it adds."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lorakit.amounts import counted, decimal_bytes, percent
from lorakit.evaluate.gguf_speed import GENERATED, REPEATS, ROUNDS
from lorakit.evaluate.ladder import UNMERGED, Ladder, differing_scores, smallest_alike
from lorakit.evaluate.report import Table

_Row = tuple[str, Mapping[str, str]]


def ladder_table(ladder: Ladder, title: str) -> Table:
    """Rungs as columns: sizes and speeds, then each score with its interval, its verdict against full precision, and
    the share of quality kept."""
    columns = [*(rung.name for rung in ladder.rungs), *([UNMERGED] if UNMERGED in ladder.speeds else [])]
    rows = [
        *_size_rows(ladder),
        *_speed_rows(ladder),
        *(row for score in ladder.names for row in _rows_of(ladder, score)),
    ]
    cells = [[label, *(of_row.get(name, "-") for name in columns)] for label, of_row in rows]
    return f"{title}: the quality ladder on {ladder.evaluation.rows_used}", ["", *columns], cells


def _size_rows(ladder: Ladder) -> list[_Row]:
    sizes = {rung.name: rung.bytes for rung in ladder.rungs}
    if ladder.unmerged is not None:
        sizes[UNMERGED] = ladder.unmerged.bytes
    bits = {rung.name: f"{ladder.gguf(rung.name).header.bits_per_weight:.2f}" for rung in ladder.rungs}
    fallbacks = {rung.name: percent(rung.fallback_share) for rung in ladder.rungs}
    files = {name: decimal_bytes(size) for name, size in sizes.items()}
    return [("file", files), ("bits a weight", bits), ("fell back", fallbacks)]


def _speed_rows(ladder: Ladder) -> list[_Row]:
    speeds = ladder.speeds.items()
    return [
        ("peak memory", {name: decimal_bytes(one.memory) for name, one in speeds}),
        ("tokens/s in", {name: f"{one.tokens_in:.1f}" for name, one in speeds}),
        ("tokens/s out", {name: f"{one.tokens_out:.1f}" for name, one in speeds}),
    ]


def _rows_of(ladder: Ladder, score: str) -> list[_Row]:
    others = [rung.name for rung in ladder.rungs[1:] if score in ladder.comparisons(rung.name)]
    values = {name: str(ladder.scores(name)[score]) for name in (ladder.full.name, *others)}
    verdicts = {name: ladder.comparisons(name)[score].verdict for name in others}
    shares = {name: ladder.quality(name)[score] for name in others}
    written = {name: "-" if share is None else percent(share, 1) for name, share in shares.items()}
    return [(score, values), (f"  against {ladder.full.name}", verdicts), ("  kept", written)]


def caption(ladder: Ladder) -> str:
    """What the figures are, and what merging gains."""
    text = (
        f"Peak memory, tokens/s: llama.cpp's server in a process for each file, {counted(ladder.threads, 'thread')}, "
        f"{ladder.prompt} tokens read and {GENERATED} written, one request at a time, the best of {REPEATS * ROUNDS}; "
        "memory is what the model adds to the process. Kept: of the loss, the share of each trained token's "
        f"probability; of another score, its share of that of {ladder.full.name}."
    )
    if UNMERGED in ladder.speeds:
        merged, apart = ladder.speeds[ladder.full.name], ladder.speeds[UNMERGED]
        text += (
            f" Merged, the model reads {merged.tokens_in / apart.tokens_in:.2f} times and writes "
            f"{merged.tokens_out / apart.tokens_out:.2f} times as many tokens a second as with the adapter beside it."
        )
    return text


def conclude(ladder: Ladder) -> str:
    """What the ladder shows, in a sentence: the smallest rung that cannot be told from full precision, and how much
    worse it may still be; or that there is none, or that the rows are too few."""
    rows, full = f"{len(ladder.evaluation.baseline.rendered.rows):,}", ladder.full.name
    if not any(ladder.comparisons(rung.name)["loss"].interval for rung in ladder.rungs[1:]):
        return f"The rows are too few ({rows}) to tell any rung from {full}."
    rung = smallest_alike(ladder)
    if rung is not None:
        text = (
            f"{rung.name} ({decimal_bytes(rung.bytes)}) is the smallest rung that cannot be told from {full} on these "
            f"{rows} rows, which leave room for it to be worse by up to {', '.join(_unseen(ladder, rung.name))}."
        )
        larger = [one.name for one in ladder.rungs[1:] if one.bytes > rung.bytes and differing_scores(ladder, one.name)]
        if larger:
            text += f" A larger one can be told ({', '.join(larger)}), so more rows would probably tell this one too."
        return text
    nearest = max(ladder.rungs[1:], key=lambda one: ladder.quality(one.name)["loss"] or 0)
    return (
        f"Every rung can be told from {full} on these {rows} rows. The nearest is {nearest.name}, which differs in "
        f"{', '.join(differing_scores(ladder, nearest.name))} and keeps "
        f"{percent(ladder.quality(nearest.name)['loss'] or 0, 2)} of each trained token's probability."
    )


def _unseen(ladder: Ladder, name: str) -> list[str]:
    """How much worse than full precision a rung may be in each score: the far end of the interval."""
    ends = []
    for score, one in ladder.comparisons(name).items():
        measure = ladder.scores(name)[score].measure
        if one.interval is None or measure.higher is None:
            continue
        worse = max(-one.interval.low if measure.higher else one.interval.high, 0.0)
        written = f"{100 * worse:.1f} points" if measure.unit == "share" else measure.write(worse)
        ends.append(f"{written} of {score}")
    return ends


def ladder_document(ladder: Ladder) -> dict[str, Any]:
    """The part of the evaluation's document that a ladder adds."""
    rungs: list[dict[str, Any]] = []
    for rung in ladder.rungs:
        facts: dict[str, Any] = {"name": rung.name, "path": str(rung.path), **ladder.gguf(rung.name).facts()}
        facts |= {"fallback_share": rung.fallback_share, **asdict(ladder.speeds[rung.name])}
        if rung is not ladder.full:
            verdicts = {score: one.verdict for score, one in ladder.comparisons(rung.name).items()}
            facts |= {"verdicts": verdicts, "quality": ladder.quality(rung.name)}
        rungs.append(facts)
    unmerged = ladder.unmerged and {"bytes": ladder.unmerged.bytes, **asdict(ladder.speeds[UNMERGED])}
    smallest = smallest_alike(ladder)
    return {
        "full": ladder.full.name,
        "rungs": rungs,
        "unmerged": unmerged,
        "speed": {
            "prompt": ladder.prompt,
            "generated": GENERATED,
            "threads": ladder.threads,
            "repeats": REPEATS * ROUNDS,
        },
        "smallest_alike": smallest and smallest.name,
        "conclusion": conclude(ladder),
    }
