"""What a run says of itself: what went into it, exactly, and what came out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorakit.atomic_io import sha256_of, write_atomic
from lorakit.data.examples import file_sha256s, tokenizer_sha256
from lorakit.hardware.memory import process_peak
from lorakit.model.tokenizer import stop_token_ids
from lorakit.prepare import Prepared
from lorakit.recipe.adapter_kind import adapter_folder, initial_adapter
from lorakit.recipe.load import to_yaml
from lorakit.recipe.schema import Adapter, Recipe
from lorakit.run_dir import Run, now, versions
from lorakit.train.micro_batching import Shrunk
from lorakit.train.setup import TrainingState


class RunRecord:
    """The files that say what a run is, recipe.yaml and manifest.json, kept true while it trains."""

    def __init__(self, run: Run, recipe: Recipe, manifest: dict[str, Any]) -> None:
        self.run, self.recipe = run, recipe
        self.manifest = manifest | {"status": "running"}

    def write(self) -> None:
        self.run.write_manifest(self.manifest)
        write_atomic(self.run.recipe, to_yaml(self.recipe, self.run.folder))

    def shrunk(self, change: Shrunk) -> None:
        """Keep what memory asked for, so that repeating or resuming the run begins with it."""
        values = {"micro_batch": change.now, "gradient_checkpointing": change.gradient_checkpointing}
        self.recipe = self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update=values)})
        facts = asdict(change)
        self.manifest["out_of_memory"] = [*self.manifest.get("out_of_memory", []), facts]
        self.write()
        self.run.log_line({"step": facts.pop("step"), "out_of_memory": facts})

    def complete(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """The manifest of the run that has ended."""
        self.manifest |= {"status": "complete", "finished": now(), "result": outcome}
        return self.manifest


def initial_manifest(prepared: Prepared, begun: TrainingState) -> dict[str, Any]:
    """The facts that are known before the first step."""
    recipe, machine = prepared.recipe, prepared.machine
    return {
        "format": 1,
        "status": "running",
        "started": now(),
        "versions": versions(),
        "machine": {"device": machine.device, "name": machine.name, "threads": torch.get_num_threads()},
        "seed": recipe.train.seed,
        "base": {
            "name": prepared.base.name,
            "revision": recipe.model.revision,
            "origin": prepared.base.origin,
            "quantization": begun.quantization["effective"],
            "held_as": begun.quantization,
            "sha256": prepared.base.sha256(),
            "stop_token_ids": stop_token_ids(prepared.base, prepared.tokenizer),
        },
        "adapter_from": _beginning(recipe.adapter),
        "tokenizer_sha256": tokenizer_sha256(prepared.tokenizer),
        "template_variables": recipe.model.template_variables,
        "template_date": recipe.model.template_date,
        "data": {
            "files": file_sha256s(recipe.data),
            "tokens_sha256": prepared.tokens_sha256,
            "train": prepared.train.report.to_dict(),
            "eval": prepared.held_out.report.to_dict() if prepared.held_out else None,
        },
        "auto": [asdict(choice) for choice in prepared.choices],
        "parameters": {"trainable": begun.trainable, "total": begun.total},
        "stop_token_ids": prepared.stop_ids,
        "steps": prepared.steps,
        "result": None,
    }


def _beginning(adapter: Adapter) -> dict[str, Any] | None:
    """The adapter that is trained on, by name and content."""
    source = initial_adapter(adapter)
    if source is None:
        return None
    folder = adapter_folder(Path(source))
    files = ("adapter_config.json", "adapter_model.safetensors")
    return {"folder": str(folder), "sha256": {name: sha256_of(folder / name) for name in files}}


def peak_memory() -> int:
    """The most memory that was held, in bytes: on a GPU since the probe began, else resident memory of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return process_peak()
