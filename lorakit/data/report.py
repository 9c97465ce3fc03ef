"""The report: what became of the rows of a recipe's sources."""

from dataclasses import dataclass, field

from lorakit.data.formats import RowError
from lorakit.recipe.problems import one_line

_NAMED = 5


@dataclass
class Report:
    """What became of the rows: counts, and the first cases of each reason with file and line."""

    sources: list[str] = field(default_factory=list)
    read: int = 0
    kept: int = 0
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, list[str]] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    stop_tokens: list[str] = field(default_factory=list)

    def drop(self, error: RowError, where: str) -> None:
        """Count a row that becomes no example."""
        reason = one_line(error.reason, 300)
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if len(self.first_dropped.setdefault(reason, [])) < _NAMED:
            self.first_dropped[reason].append(f"{where}: {one_line(error.case, 200)}" if error.case else where)

    def reasons(self) -> str:
        """Every reason with its count and its first case, the most frequent first."""
        counts = sorted(self.dropped.items(), key=lambda item: -item[1])
        return "; ".join(f"{count:,} {reason} (first: {self.first_dropped[reason][0]})" for reason, count in counts)
