"""Data sets of benchmarks from a folder: as the hub lays them out, or in the files that their authors published."""

import csv
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetsError

from lorakit.errors import UserError

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
# Words of a file's name that tell its split, and the splits that tasks call so.
_SPLITS = {
    "train": ("train",),
    "training": ("train",),
    "dev": ("dev", "validation"),
    "val": ("validation", "val"),
    "valid": ("validation", "val"),
    "validation": ("validation", "val"),
    "test": ("test",),
}
_WHOLE = ("test", "validation")
"""What a file without such a word is."""
_LISTED = 10


class LocalData:
    """The data sets in a folder, by the names that they have on the hub.

    A data set is a folder of its name (`openai/gsm8k`, `gsm8k`, the hub cache's `datasets--openai--gsm8k`), which the
    library datasets reads by its own rules, or files that begin with its name and say their split
    (`gsm8k-train.jsonl`, `HumanEval.jsonl.gz`). MMLU may also be its authors' CSV files.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"--benchmark-data: {folder} is not a folder.")
        self.folder = folder

    def load(self, path: str, name: str | None, **options: Any) -> Mapping[str, Any]:
        """The splits of a data set of the hub, or of its part of this name. `options`: of datasets' load_dataset. An
        error if the folder has none."""
        short = path.rpartition("/")[2]
        try:
            splits = self._of_folder(path, name, options)
            splits = splits or (_mmlu(self._files, name) if short == "mmlu" else self._of_files(short))
        except (OSError, ValueError, DatasetsError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(
                f"--benchmark-data: {self.folder}: its data for {path} cannot be read: {reason}. Fetch the files again."
            ) from error
        if not splits:
            raise UserError(
                f"--benchmark-data: {self.folder} has no data for {path}. Put it there as a folder {path}, as on "
                f"the hub, or as files such as {short}-test.jsonl."
            )
        return _Splits(splits, path, self.folder)

    @cached_property
    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.rglob("*") if file.is_file())

    def _of_folder(self, path: str, name: str | None, options: Mapping[str, Any]) -> Mapping[str, Any] | None:
        owner, _, short = path.rpartition("/")
        versions = self.folder / f"datasets--{owner}--{short}" / "snapshots"
        newest = sorted(versions.iterdir(), key=lambda one: one.stat().st_mtime)[-1:] if versions.is_dir() else []
        places = [self.folder / path, self.folder / f"{owner}--{short}", self.folder / short, *newest]
        for folder in (place for place in places if place.is_dir() and any(place.iterdir())):
            parts = get_dataset_config_names(str(folder))
            if name is None or name in parts:
                return load_dataset(str(folder), name, **options)
            if (folder / name).is_dir():
                return load_dataset(str(folder / name), **options)
            if parts == ["default"]:
                return load_dataset(str(folder), **options)
        return None

    def _of_files(self, short: str) -> dict[str, Any]:
        files: dict[str, Path] = {}
        for file, words in self._named(short):
            splits = next((_SPLITS[word] for word in words if word in _SPLITS), _WHOLE)
            for split in splits:
                if split in files and files[split].parent == file.parent:
                    raise UserError(
                        f"--benchmark-data: {files[split]} and {file} both look like the split {split!r} of {short}. "
                        "Leave one there."
                    )
                files.setdefault(split, file)
        return {split: _read(file) for split, file in files.items()}

    def _named(self, short: str) -> Iterator[tuple[Path, list[str]]]:
        """The files whose names begin with a data set's, each with the words that follow. `openai_humaneval` is also
        `HumanEval`."""
        spellings = "|".join(re.escape(one) for one in (short.lower(), short.lower().partition("_")[2]) if one)
        for file in self._files:
            match = re.match(rf"(?:{spellings})(?:[\W_]+(.*))?$", _stem(file).lower())
            if match and _suffix(file) in _READERS:
                yield file, re.split(r"[\W_]+", match[1] or "")


class _Splits(dict[str, Any]):
    """Says of a split that is not there where it was looked for."""

    def __init__(self, splits: Mapping[str, Any], path: str, folder: Path) -> None:
        super().__init__(splits)
        self._path, self._folder = path, folder

    def __missing__(self, split: str) -> Any:
        raise UserError(
            f"--benchmark-data: the task needs the split {split!r} of {self._path}, and {self._folder} has only "
            f"{', '.join(self)}. Add it, such as {self._path.rpartition('/')[2]}-{split}.jsonl."
        )


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in _COMPRESSED else file.suffix


def _stem(file: Path) -> str:
    return Path(file.stem).stem if file.suffix in _COMPRESSED else file.stem


def _read(file: Path) -> Any:
    reader = _READERS[_suffix(file)]
    return load_dataset(reader, data_files={"rows": str(file)}, split="rows")


def _mmlu(files: list[Path], subject: str | None) -> dict[str, Any]:
    """A subject of MMLU from its authors' files (`anatomy_test.csv`): question, four choices, a letter; no header."""
    splits = {"dev": "dev", "val": "validation", "test": "test"}
    places = {split: file for file in files for word, split in splits.items() if file.name == f"{subject}_{word}.csv"}

    def read(file: Path) -> Any:
        with file.open(encoding="utf-8", newline="") as lines:
            return Dataset.from_list(
                [
                    {"question": question, "choices": choices, "answer": "ABCD".index(letter)}
                    for question, *choices, letter in csv.reader(lines)
                ]
            )

    return {split: read(file) for split, file in places.items()}
