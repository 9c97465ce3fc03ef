"""The files of a run: recipe.yaml and manifest.json while it trains, and the adapter's or the model's folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorakit.atomic_io import atomic_dir, files_in, sha256_of, write_atomic
from lorakit.data.examples import file_sha256s, tokenizer_sha256
from lorakit.hardware.memory import process_peak
from lorakit.model.adapters.plain_lora import save_adapter
from lorakit.model.companion_files import write_tokenizer, write_trained_model
from lorakit.model.load import DTYPES, stored_dtype
from lorakit.model.tokenizer import stop_token_ids
from lorakit.prepare import Prepared
from lorakit.recipe.adapter_kind import adapter_folder, initial_adapter, trains_all
from lorakit.recipe.load import to_yaml
from lorakit.recipe.schema import Recipe
from lorakit.run_dir import Run, now, versions
from lorakit.train.card import adapter_card, model_card
from lorakit.train.setup import TrainingState


class RunRecord:
    """The recipe and the manifest of a run, kept true while it trains."""

    def __init__(self, run: Run, recipe: Recipe, manifest: dict[str, Any]) -> None:
        self.run, self.recipe = run, recipe
        self.manifest = manifest | {"status": "running"}

    def write(self) -> None:
        self.run.write_manifest(self.manifest)
        write_atomic(self.run.recipe, to_yaml(self.recipe, self.run.folder))

    def add_out_of_memory(self, change: dict[str, Any]) -> None:
        """Record what the run goes on with after memory ran out, so that repeating or resuming it begins with that."""
        values = {"micro_batch": change["now"], "gradient_checkpointing": change["gradient_checkpointing"]}
        self.recipe = self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update=values)})
        self.manifest["out_of_memory"] = [*self.manifest.get("out_of_memory", []), change]
        self.write()
        facts = {key: value for key, value in change.items() if key != "step"}
        self.run.log_line({"step": change["step"], "out_of_memory": facts})

    def complete(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """The manifest of the run that has ended."""
        self.manifest |= {"status": "complete", "finished": now(), "result": outcome}
        return self.manifest


def initial_manifest(prepared: Prepared, state: TrainingState) -> dict[str, Any]:
    """The facts that are known before the first step."""
    recipe, machine, adapter_from = prepared.recipe, prepared.machine, None
    if source := initial_adapter(recipe.adapter):
        folder = adapter_folder(Path(source))
        files = ("adapter_config.json", "adapter_model.safetensors")
        adapter_from = {"folder": str(folder), "sha256": {name: sha256_of(folder / name) for name in files}}
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
            "quantization": state.quantization["effective"],
            "held_as": state.quantization,
            "sha256": prepared.base.sha256(),
            "stop_token_ids": stop_token_ids(prepared.base, prepared.tokenizer),
        },
        "adapter_from": adapter_from,
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
        "parameters": {"trainable": state.trainable, "total": state.total},
        "stop_token_ids": prepared.stop_ids,
        "steps": prepared.steps,
        "result": None,
    }


def save_result(state: TrainingState, prepared: Prepared, run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the adapter with the tokenizer it was trained with and a card, or the model. The sha256 of its weights.

    A whole model is rounded to the type that its base has on disk.
    """
    recipe, model = prepared.recipe, state.model
    if trains_all(recipe.adapter):
        with atomic_dir(run.model) as draft:
            model.to(DTYPES[stored_dtype(prepared.base)])
            model.config = state.config
            write_trained_model(model, prepared.base.folder, prepared.tokenizer, prepared.stop_ids, draft)
            (draft / "README.md").write_text(model_card(recipe, manifest), encoding="utf-8")
        files = [*run.model.glob("*.safetensors"), run.model / "config.json"]
        return {
            "model_sha256": {path.name: sha256_of(path) for path in sorted(files)},
            "files": files_in(run.model),
        }
    with atomic_dir(run.adapter) as draft:
        save_adapter(model, draft)
        write_tokenizer(prepared.base.folder, prepared.tokenizer, draft)
        (draft / "README.md").write_text(adapter_card(recipe, manifest), encoding="utf-8")
    return {
        "files": files_in(run.adapter),
        "adapter_sha256": sha256_of(run.adapter / "adapter_model.safetensors"),
        "adapter_config_sha256": sha256_of(run.adapter / "adapter_config.json"),
    }


def peak_memory() -> int:
    """The most memory in use, in bytes: on a GPU since the probe began, otherwise resident memory of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return process_peak()
