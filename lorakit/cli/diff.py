"""`lorakit diff`"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.amounts import counted, format_difference, format_score, percent
from lorakit.cli.options import Json, Quiet, quoted

if TYPE_CHECKING:
    from lorakit.share.adapter_distance import AdapterDistance, Distance
    from lorakit.share.diff import Difference, KeyDifference
    from lorakit.share.score_diff import ScoreDifference

_MODULES = 10
_SIDES = {"train": "training rows", "eval": "held-out rows"}


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run's folder, or a recipe.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what differs from A to B, two runs or recipes: recipe, rows, versions, base, adapter and scores.

    Rows are compared by what they say where their files are still there, and by the files' sha256 where they are not.
    Adapters on the same base are compared module by module, scores pair by pair where both were measured on the same
    rows. Nothing is trained or scored.
    """
    from lorakit import console
    from lorakit.share.diff import diff as compare
    from lorakit.share.diff_side import open_side

    difference = compare(open_side(a), open_side(b), console.Terminal(quiet))
    if as_json:
        console.result_json(difference.to_dict())
        return
    console.result(f"A  {a}  ({difference.a.kind})\nB  {b}  ({difference.b.kind})\n")
    _print_keys(difference.keys)
    if unchecked := sorted({*difference.a.unchecked, *difference.b.unchecked}):
        _line("recipe, not compared", f"{', '.join(unchecked)}: what they name is not here")
    _print_data(difference)
    _print_versions(difference)
    _print_base(difference.base)
    _print_adapters(difference.adapters)
    _print_scores(difference.scores, a, b)


def _line(title: str, text: str) -> None:
    from lorakit import console

    console.result_wrapped(text, under="  ", begin=f"{title}: ")


def _print_keys(keys: "Sequence[KeyDifference]") -> None:
    from lorakit import console
    from lorakit.share.diff_side import show_value

    if not keys:
        _line("recipe", "the same")
        return
    rows = [
        [one.key, *(show_value(value) + (" (auto)" if auto and value != "auto" else "") for value, auto in _sides(one))]
        for one in keys
    ]
    console.result_table(f"recipe: {counted(len(keys), 'key')}", ["", "A", "B"], rows, whole_lines=True)


def _sides(one: "KeyDifference") -> list[tuple[Any, bool]]:
    return [(one.a, one.auto_a), (one.b, one.auto_b)]


def _print_data(difference: "Difference") -> None:
    from lorakit import console
    from lorakit.share.diff_side import show_value

    files = difference.files
    if isinstance(files, str):
        _line("data files", f"not compared: {files}")
    else:
        for word, paths in (("only in A", files.only_a), ("only in B", files.only_b)):
            for path in paths:
                _line(f"data file {word}", show_value(path))
        if not files.only_a and not files.only_b:
            _line("data files", f"the same ({counted(len(files.same), 'file')}, by sha256)")
    for side, title in _SIDES.items():
        rows = difference.rows[side]  # type: ignore[index]
        if isinstance(rows, str):
            _line(title, f"not compared one by one: {rows}" if rows != "both have none" else rows)
        else:
            text = f"{rows.added:,} added, {rows.removed:,} removed, {rows.both:,} in both"
            _line(title, text + (f"; {rows.unreadable:,} unreadable ones left out" if rows.unreadable else ""))
            for sign, shown in (("+", rows.first_added), ("-", rows.first_removed)):
                for row in shown:
                    console.result_wrapped(f"{row.where}  {row.text}", under="      ", begin=f"  {sign} ")
        same = difference.same_tokens[side]  # type: ignore[index]
        if same is not None and (isinstance(rows, str) or not (rows.added or rows.removed)):
            _line(title, "they became the same tokens and labels" if same else "they became other tokens or labels")


def _print_versions(difference: "Difference") -> None:
    from lorakit import console

    if not difference.versions:
        _line("versions", "the same")
        return
    rows = [[name, *(version or "-" for version in pair)] for name, pair in difference.versions.items()]
    console.result_table("versions", ["", "A", "B"], rows, whole_lines=True)


def _print_base(base: dict[str, Any]) -> None:
    names = [f"{one['name']} ({one['origin'] or 'revision ' + str(one['revision'])})" for one in (base["a"], base["b"])]
    both = names[0] if names[0] == names[1] else f"A {names[0]}, B {names[1]}"
    if base["same"] is None:
        alike = [base["a"][key] == base["b"][key] for key in ("name", "revision")]
        word = "the same name and revision" if all(alike) else "another name or revision"
        _line("base", f"{word}; files are compared between runs alone: {both}")
        return
    text = "the same files, by sha256" if base["same"] else f"other files: {', '.join(base['differing'])} differ"
    tokenizer = "" if base["same_tokenizer"] else "; another tokenizer or chat template"
    _line("base", f"{text}{tokenizer}: {both}")


def _print_adapters(adapters: "AdapterDistance | str") -> None:
    from lorakit import console

    if isinstance(adapters, str):
        _line("adapters", f"not compared: {adapters}")
        return
    total = adapters.total
    _line(
        "adapters",
        f"|A - B| is {_share(total)} of |A|, over {counted(len(adapters.modules), 'module')}: |A| {total.norm_a:.4g}, "
        f"|B| {total.norm_b:.4g}, |A - B| {total.distance:.4g} (Frobenius norms of scale * B A)",
    )
    parts = [(one, one.module) for one in adapters.modules[:_MODULES] if one.distance]
    parts += [(one, f"{one.module} (as stored)") for one in adapters.tensors[:_MODULES] if one.distance]
    if parts:
        rows = [
            [name, f"{one.norm_a:.4g}", f"{one.norm_b:.4g}", f"{one.distance:.4g}", _share(one)] for one, name in parts
        ]
        title = f"the largest distances of {len(adapters.modules) + len(adapters.tensors):,}"
        console.result_table(title, ["module", "|A|", "|B|", "|A - B|", "of |A|"], rows, whole_lines=True)
    for word, names in (
        ("only in A", adapters.only_a),
        ("only in B", adapters.only_b),
        ("other shapes", adapters.unlike),
    ):
        if names:
            _line(f"modules, {word}", ", ".join(names[:_MODULES]) + (", ..." if len(names) > _MODULES else ""))


def _share(one: "Distance") -> str:
    return "-" if one.relative is None else percent(one.relative, 1)


def _print_scores(scores: "ScoreDifference | str", a: Path, b: Path) -> None:
    from lorakit import console

    if isinstance(scores, str):
        _line("scores", f"not compared: {scores}")
        return
    rows = []
    for name, first in scores.first.scores.items():
        second, unit = scores.second.scores.get(name), str(first.get("unit"))
        cells = [name, _score(first, unit), _score(second, unit) if second else "-"]
        rows.append([*cells, *_comparison(scores, name, unit)])
    columns = ["", "A", "B", "B - A", "95 % interval", "verdict"]
    console.result_table("scores, with 95 % intervals", columns, rows, whole_lines=True)
    for name, reason in scores.unpaired.items():
        command = f"lorakit eval {quoted(a)} {quoted(b)} gives a verdict"
        _line(f"no paired verdict{' on ' + name if name else ''}", f"{reason}. {command}.")


def _score(one: dict[str, Any], unit: str) -> str:
    interval = [one.get(end) for end in ("low", "high")]
    bounds = [format_score(end, unit) for end in interval if isinstance(end, int | float)]
    return format_score(one["value"], unit) + (f" ({' to '.join(bounds)})" if len(bounds) == 2 else "")


def _comparison(scores: "ScoreDifference", name: str, unit: str) -> list[str]:
    if name not in scores.comparisons:
        return ["-", "-", "-"]
    one = scores.comparisons[name]
    low, high = (one.interval.low, one.interval.high) if one.interval else (math.nan, math.nan)
    interval = f"{format_difference(low, unit)} to {format_difference(high, unit)}" if one.interval else "-"
    return [format_difference(one.difference, unit), interval, one.verdict]
