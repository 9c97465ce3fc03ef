"""What differs between two runs, a run and a recipe, or two recipes: keys, rows, versions, base, adapter and scores.
Without torch, but for the adapters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError
from lorakit.progress import Progress
from lorakit.recipe.fields import is_split
from lorakit.run_dir import versions
from lorakit.share.diff_side import SIDES, DiffSide, Side, align_sources
from lorakit.share.row_diff import RowDifference, compare_rows
from lorakit.share.score_diff import ScoreDifference, compare_scores
from lorakit.share.scores import find_scores, find_shared_scores, value_at

if TYPE_CHECKING:
    from lorakit.share.adapter_distance import AdapterDistance

_ABSENT = object()


@dataclass(frozen=True)
class KeyDifference:
    """A key of the recipe in which two differ, as both say it; None where one has no such key. `auto`: who left it
    open, and was given this value."""

    key: str
    a: Any
    b: Any
    auto_a: bool
    auto_b: bool


@dataclass(frozen=True)
class FileDifference:
    """Data files of two, by content. Renamed and moved ones are the same."""

    same: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """All that differs. What could not be compared says why in words: of rows each side, of the adapters, of scores."""

    a: DiffSide
    b: DiffSide
    keys: tuple[KeyDifference, ...]
    files: FileDifference | str
    same_tokens: dict[Side, bool | None]
    rows: dict[Side, RowDifference | str]
    versions: dict[str, tuple[str | None, str | None]]
    base: dict[str, Any]
    adapters: "AdapterDistance | str"
    scores: ScoreDifference | str

    def to_dict(self) -> dict[str, Any]:
        """The facts for `--json`."""

        def or_reason(one: Any) -> Any:
            return {"not_compared": one} if isinstance(one, str) else one.to_dict()

        files = {"not_compared": self.files} if isinstance(self.files, str) else vars(self.files)
        return {
            "a": {"path": str(self.a.given), "kind": self.a.kind},
            "b": {"path": str(self.b.given), "kind": self.b.kind},
            "recipe": [vars(one) for one in self.keys],
            "recipe_not_compared": sorted({*self.a.unchecked, *self.b.unchecked}),
            "data": {
                "files": files,
                "same_tokens": self.same_tokens,
                "rows": {side: or_reason(one) for side, one in self.rows.items()},
            },
            "versions": {name: dict(zip("ab", pair, strict=True)) for name, pair in self.versions.items()},
            "base": self.base,
            "adapters": or_reason(self.adapters),
            "scores": or_reason(self.scores),
        }


def diff(a: DiffSide, b: DiffSide, progress: Progress) -> Difference:
    """All that differs from `a` to `b`."""
    return Difference(
        a,
        b,
        tuple(_compare_keys(a, b)),
        _compare_files(a, b),
        {side: _same_tokens(a, b, side) for side in SIDES},
        {side: _compare_side(a, b, side, progress) for side in SIDES},
        _compare_versions(a, b),
        _compare_bases(a, b),
        _compare_adapters(a, b, progress),
        _compare_scores(a, b),
    )


def _compare_keys(a: DiffSide, b: DiffSide) -> Iterator[KeyDifference]:
    left_out = {*a.unchecked, *b.unchecked, *a.unread, *b.unread}
    keys_a, keys_b = align_sources(a.keys, b.keys), align_sources(b.keys, a.keys)
    for key in (key for key in dict.fromkeys([*keys_a, *keys_b]) if not _is_part(key, left_out)):
        left, right = keys_a.get(key, _ABSENT), keys_b.get(key, _ABSENT)
        if left != right and not (_is_open(left, b, right, key) or _is_open(right, a, left, key)):
            values = [None if one is _ABSENT else one for one in (left, right)]
            yield KeyDifference(key, values[0], values[1], key in a.auto, key in b.auto)


def _is_part(key: str, names: set[str]) -> bool:
    """Whether a dotted key is one of these names, or below one."""
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in names)


def _is_open(value: Any, other: DiffSide, chosen: Any, key: str) -> bool:
    """Whether a key is open here, and was open to the other one too, for which it was settled, maybe as null."""
    return bool(value == "auto" and other.run and (key in other.auto or chosen is None))


def _compare_files(a: DiffSide, b: DiffSide) -> FileDifference | str:
    files_a, files_b = a.files, b.files
    if isinstance(files_a, str) or isinstance(files_b, str):
        return files_a if isinstance(files_a, str) else str(files_b)
    both = set(files_a.values()) & set(files_b.values())
    return FileDifference(
        tuple(path for path, sha256 in files_a.items() if sha256 in both),
        tuple(path for path, sha256 in files_a.items() if sha256 not in both),
        tuple(path for path, sha256 in files_b.items() if sha256 not in both),
    )


def _same_tokens(a: DiffSide, b: DiffSide, side: Side) -> bool | None:
    """Whether the rows of two runs became the same tokens with the same labels; None where that is not recorded."""
    one, other = (value_at(each.manifest, "data", "tokens_sha256", side) for each in (a, b))
    return None if one is None or other is None else bool(one == other)


def _compare_side(a: DiffSide, b: DiffSide, side: Side, progress: Progress) -> RowDifference | str:
    written = [getattr(one.recipe.data, side) for one in (a, b)]
    if any(is_split(one) for one in written):
        return "held-out rows are a share of the training rows, which are compared before that split"
    if written == [None, None]:
        return "both have none"
    located = []
    for one in (a, b):
        try:
            located.append(one.locate(side))
        except UserError as error:
            return f"{one.given}: {str(error).rstrip('.')}"
    try:
        return compare_rows(located[0], located[1], progress)
    except UserError as error:
        return str(error).rstrip(".")


def _compare_versions(a: DiffSide, b: DiffSide) -> dict[str, tuple[str | None, str | None]]:
    """Packages whose versions differ, and the device; of a recipe those that are installed here."""
    sides = []
    for one in (a, b):
        of_run = value_at(one.manifest, "versions")
        sides.append(dict(of_run) if isinstance(of_run, dict) else versions())
    if a.run and b.run:
        for name in ("device", "name"):
            for one, facts in zip((a, b), sides, strict=True):
                facts[f"machine.{name}"] = value_at(one.manifest, "machine", name)
    names = dict.fromkeys([*sides[0], *sides[1]])
    return {
        name: (sides[0].get(name), sides[1].get(name)) for name in names if sides[0].get(name) != sides[1].get(name)
    }


def _compare_bases(a: DiffSide, b: DiffSide) -> dict[str, Any]:
    """Both bases, the files in which they differ, and whether they are the same: None where only names are known."""
    facts: dict[str, Any] = {"same": None, "differing": []}
    for word, one in (("a", a), ("b", b)):
        model = one.recipe.model
        named = value_at(one.manifest, "base") or {"name": model.base, "revision": model.revision, "origin": None}
        facts[word] = {key: named.get(key) for key in ("name", "revision", "origin")}
    if a.manifest and b.manifest:
        of_a, of_b = (one["base"]["sha256"] for one in (a.manifest, b.manifest))
        facts["differing"] = sorted(name for name in {*of_a, *of_b} if of_a.get(name) != of_b.get(name))
        facts["same"] = not facts["differing"]
        facts["same_tokenizer"] = a.manifest.get("tokenizer_sha256") == b.manifest.get("tokenizer_sha256")
    return facts


def _compare_adapters(a: DiffSide, b: DiffSide, progress: Progress) -> "AdapterDistance | str":
    for one in (a, b):
        if one.run is None:
            return f"{one.given} is a recipe"
        if not (one.run.adapter / "adapter_model.safetensors").is_file():
            trained = "trained the weights themselves" if one.run.model.is_dir() else "has no adapter"
            return f"{one.given} {trained}"
    of_a, of_b = (one.manifest["base"]["sha256"] if one.manifest else {} for one in (a, b))
    weights = [name for name in {*of_a, *of_b} if name.endswith(".safetensors")]
    if any(of_a.get(name) != of_b.get(name) for name in weights):
        return "they are of bases with other weights"
    from lorakit.share.adapter_distance import compare_adapters

    assert a.run and b.run
    try:
        return compare_adapters(a.run.adapter, b.run.adapter, progress)
    except UserError as error:
        return str(error).rstrip(".")


def _compare_scores(a: DiffSide, b: DiffSide) -> ScoreDifference | str:
    runs = []
    for one in (a, b):
        if one.run is None or one.manifest is None:
            return f"{one.given} is a recipe"
        runs.append((one.run, one.manifest))
    if shared := find_shared_scores(runs):
        return compare_scores(*shared)
    of_each = [find_scores(*one)[0] for one in runs]
    for one, scores in zip((a, b), of_each, strict=True):
        if scores is None:
            return f"{one.given} has no scores of what it trained: lorakit eval {one.given} makes some"
    first, second = of_each
    assert first and second
    return compare_scores(first, second)
