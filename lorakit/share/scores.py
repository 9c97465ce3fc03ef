"""The scores that a run's folder holds: documents of `lorakit eval`, and which model of each is what the run trained.
Without torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.atomic_io import read_json_object
from lorakit.run_dir import Run

_FORMAT = 2  # of the documents; docs/evaluation.md has their fields
_TRAINED = "adapter_model.safetensors"


def value_at(facts: Any, *path: str) -> Any:
    """What stands at a path of keys in mappings within mappings; None where nothing does."""
    for key in path:
        facts = facts.get(key) if isinstance(facts, dict) else None
    return facts


@dataclass(frozen=True)
class StoredScores:
    """A document of scores, and the name in it of what the run trained."""

    path: Path
    document: dict[str, Any]
    model: str

    @property
    def date(self) -> str:
        """When it was scored, in UTC."""
        return str(self.document.get("taken", ""))

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of answers: each one's settings by its name, None where it has none."""
        written = value_at(self.document, "settings", "metrics")
        metrics: dict[str, Any] = {}
        for metric in written if isinstance(written, list) else ():
            metrics |= metric if isinstance(metric, dict) else {str(metric): None}
        return metrics

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Each score over all rows, by its name: value, low, high, unit, rows."""
        return _numbers(value_at(self.document, "models", self.model, "scores"), "value")

    @property
    def main_score(self) -> str | None:
        """The name of the score that the recipe's first metric gives; the loss where no metric gave any."""
        names = [name for metric in self.metrics for name in self.scores if name.split(".")[0] == metric]
        return next(iter(names), "loss" if "loss" in self.scores else None)

    @property
    def answers(self) -> Path | None:
        """The file of the rows' answers beside the document."""
        name = self.document.get("answers")
        return self.path.with_name(name) if isinstance(name, str) and Path(name).name == name else None

    def verdict(self, name: str) -> str | None:
        """The verdict of a score against the base; None where the base was not what it was compared with."""
        comparisons = self.document.get("comparisons")
        for one in comparisons if isinstance(comparisons, list) else ():
            against = value_at(one, "against")
            is_base = value_at(self.document, "models", str(against), "kind") == "base"
            if is_base and value_at(one, "model") == self.model:
                verdict = value_at(one, "scores", name, "verdict")
                return verdict if isinstance(verdict, str) else None
        return None


def find_shared_scores(runs: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[StoredScores] | None:
    """The newest document in the folders of some runs, each with its manifest, that scored what all of them trained,
    once for each run; None where there is none."""
    documents = sorted((one for run, _ in runs for one in _documents(run)), key=lambda one: one[0].name, reverse=True)
    for path, document in documents:
        names = [trained_model(document, manifest) for _, manifest in runs] if document else [None]
        if document and None not in names:
            return [StoredScores(path, document, str(name)) for name in names]
    return None


def find_scores(run: Run, manifest: Mapping[str, Any]) -> tuple[StoredScores | None, list[Path]]:
    """The newest document that scored what the run trained, and the newer ones that could not be read."""
    damaged = []
    for path, document in _documents(run):
        if document is None:
            damaged.append(path)
        elif name := trained_model(document, manifest):
            return StoredScores(path, document, name), damaged
    return None, damaged


def trained_model(document: Mapping[str, Any], manifest: Mapping[str, Any]) -> str | None:
    """The name that a document has for what a run trained, known by its sha256; None where it did not score that."""
    adapter, weights = manifest.get("adapter_sha256"), manifest.get("model_sha256")
    for name, facts in document["models"].items():
        if adapter and value_at(facts, "identity", "adapter", _TRAINED) == adapter:
            return str(name)
        of_base = value_at(facts, "identity", "base")
        if isinstance(weights, dict) and isinstance(of_base, list):
            files = [[file, sha256] for file, sha256 in weights.items() if file.endswith(".safetensors")]
            if files and all(file in of_base for file in files):
                return str(name)
    return None


def _documents(run: Run) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Every document of scores, newest first; None for one that is damaged, or of another version's format."""
    for path in run.list_evaluations():
        document = read_json_object(path)
        readable = document and document.get("format") == _FORMAT and isinstance(document.get("models"), dict)
        yield path, document if readable else None


def _numbers(scores: Any, key: str) -> dict[str, dict[str, Any]]:
    facts = scores.items() if isinstance(scores, dict) else ()
    return {str(name): of for name, of in facts if isinstance(of, dict) and isinstance(of.get(key), int | float)}
