"""The report: what became of the rows of a recipe's sources."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lorakit.data.rows import RowError
from lorakit.recipe.problem import one_line

_NAMED = 5
# Fields whose key in files is another.
_KEYS = {"used": "kept", "passed_over": "not_taken", "findings": "found"}
_FIELDS = {key: field for field, key in _KEYS.items()}


def _renamed(facts: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in facts.items()}


@dataclass
class SourceReport:
    """One source: its format and how that is known, and what of it is left."""

    path: str
    format: str | None
    why: str
    task: str | None = None
    weight: float = 1.0
    used: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def __str__(self) -> str:
        task = f", task {self.task}" if self.task else ""
        weight = f", weight {self.weight:g}" if self.weight != 1 else ""
        return f"{self.path}: {self.format or 'no format'} ({self.why}){task}{weight}"


@dataclass
class ReasonCounts:
    """Things counted by reason, the first cases of each named with file and line."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str, case: str = "") -> None:
        reason = one_line(reason, 300)
        self.counts[reason] = self.counts.get(reason, 0) + 1
        named = self.first.setdefault(reason, [])
        if len(named) < _NAMED:
            named.append(f"{where}: {one_line(case, 200)}" if case else where)

    def add_rows(self, reason: str, rows: int, first: list[tuple[str, str]]) -> None:
        """Count some rows with the place and the case of the first of them."""
        for where, case in first:
            self.add(reason, where, case)
        if rows > len(first):
            self.counts[one_line(reason, 300)] += rows - len(first)

    def merge(self, other: "ReasonCounts") -> None:
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            named = self.first.setdefault(reason, [])
            named += other.first[reason][: _NAMED - len(named)]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self, words: str = "") -> list[str]:
        """Each reason after its count and some `words`, with its first case, the most frequent first."""
        counts, words = sorted(self.counts.items(), key=lambda item: -item[1]), f"{words} " if words else ""
        return [f"{count:,} {words}{reason} (first: {self.first[reason][0]})" for reason, count in counts]


@dataclass
class Report:
    """What became of the rows: counts, and the first cases of each reason with file and line. `used` rows gave
    `examples`: a row whose template rewrites its history, or a split text, gives several (`several` rows did). `cut`
    rows were truncated, `passed_over` ones by a source's `take`. `findings`: of the checks of `data.clean`, each reason
    with its check's name in front. `notes`: what is to be said of how rows are trained, with the number of rows that it
    holds for. `tasks`: the used rows of each tag."""

    sources: list[SourceReport] = field(default_factory=list)
    read: int = 0
    used: int = 0
    examples: int = 0
    several: int = 0
    cut: int = 0
    passed_over: int = 0
    dropped: ReasonCounts = field(default_factory=ReasonCounts)
    findings: ReasonCounts = field(default_factory=ReasonCounts)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    stop_tokens: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)

    @property
    def mean_length(self) -> float:
        """The tokens of an example on average."""
        return self.tokens / max(self.examples, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, under the keys of manifests and of --json; `from_dict` is the inverse."""
        facts = _renamed(asdict(self), _KEYS)
        return {**facts, "sources": [_renamed(source, _KEYS) for source in facts["sources"]]}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "Report":
        fields = _renamed(facts, _FIELDS)
        fields["sources"] = [SourceReport(**_renamed(source, _FIELDS)) for source in facts["sources"]]
        fields["dropped"], fields["findings"] = ReasonCounts(**facts["dropped"]), ReasonCounts(**facts["found"])
        return cls(**fields)

    def merge(self, other: "Report") -> None:
        """Add the rows of another report that became no example, and the findings."""
        self.passed_over += other.passed_over
        self.dropped.merge(other.dropped)
        self.findings.merge(other.findings)

    def drop(self, error: RowError, where: str) -> None:
        self.dropped.add(error.reason, where, error.case)
