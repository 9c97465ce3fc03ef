"""What is exported: an adapter, or the merged model that was proved to answer as it does, and what an export is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit.atomic_io import read_own_json, sha256_of
from lorakit.errors import UserError
from lorakit.model.resolve import Base
from lorakit.run_dir import MERGED

_TEXTS = 64


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, read back from what was written: what, whether it holds, and the figures. An export
    is refused where one that is `fatal` does not hold, and comes with a warning for another."""

    name: str
    holds: bool
    detail: str
    fatal: bool = True


@dataclass(frozen=True)
class Export:
    """What an exporter wrote, besides the files themselves: facts for export.json, checks, and the README's text: how
    to start a server on it, and what to look out for."""

    facts: dict[str, Any]
    checks: tuple[Check, ...]
    readme: str
    is_card: bool = False  # whether the README is whole, such as a model card, and gets no heading


@dataclass(frozen=True)
class ExportSource:
    """A model to export. `folder` is as it was given; `adapter` is in PEFT's format, None for a model that was trained
    as a whole; `merged` gives the folder of the whole model, made and proved where it is not there yet. `read_rows`
    gives rows in the training's tokens: the held-out ones where there are any."""

    name: str
    folder: Path
    base: Base
    adapter: Path | None
    merged: Callable[[], Path]
    tokenizer: Any
    stop_ids: tuple[int, ...]
    read_rows: Callable[[], list[dict[str, Any]]]
    llama_cpp: Path | None = None
    system: str | None = None  # the system prompt of the training, for rows that have none
    variables: Mapping[str, Any] = field(default_factory=dict)  # what the training's prompts give the chat template
    date: str | None = None  # the day that the chat template takes for today
    max_length: int | None = None  # the most tokens of a row of the training
    shared: Path | None = None  # a temporary folder for files that several targets are made from
    quantization: str = "none"  # of the base in training
    needs_quantized: bool = False  # whether the adapter makes up for what that quantization took away (loftq)

    @cached_property
    def merged_model(self) -> Path:
        """The folder of the whole model: a merge that was proved, or what a full fine-tuning wrote."""
        folder = self.merged()
        if (folder / MERGED).is_file():
            refuse_unproved(folder, self.adapter)
        return folder

    @cached_property
    def texts(self) -> list[str]:
        """Rows of the training or held-out set as the chat template wrote them, to compare tokenizers on."""
        rows = self.read_rows()
        some = rows[:: max(1, len(rows) // _TEXTS)][:_TEXTS]
        return [self.tokenizer.decode(row["input_ids"], skip_special_tokens=False) for row in some]

    @property
    def added_tokens(self) -> list[str]:
        """The texts that the training made tokens of (`model.add_tokens`)."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(self.base.new_rows))
        return [token for token in tokens if token is not None]


def refuse_unproved(folder: Path, adapter: Path | None) -> None:
    """Refuse a merge that was not proved, or that is of another adapter than the one that is exported."""
    facts = read_own_json(folder / MERGED)
    if not facts.get("proof"):
        raise UserError(
            f"{folder}: was merged without a proof (--no-proof), so nothing shows that it answers as the adapter does. "
            "Merge again without --no-proof."
        )
    file = adapter / "adapter_model.safetensors" if adapter else None
    if file and file.is_file() and facts.get("adapter_sha256") != sha256_of(file):
        raise UserError(f"{folder}: is the merge of another adapter than {adapter}. Merge again with --overwrite.")
