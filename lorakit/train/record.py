"""The manifest of a run: what went into it, exactly, and what came out."""

import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorakit.data.examples import file_sha256s, tokenizer_sha256
from lorakit.folders import sha256_of
from lorakit.plan.prepare import Prepared
from lorakit.recipe.kinds import adapter_folder, begins_from
from lorakit.recipe.schema import Adapter
from lorakit.runs import now, versions
from lorakit.train.begin import Begun


def manifest_of(prepared: Prepared, begun: Begun) -> dict[str, Any]:
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
        },
        "adapter_from": _beginning(recipe.adapter),
        "tokenizer_sha256": tokenizer_sha256(prepared.tokenizer),
        "data": {
            "files": file_sha256s(recipe.data),
            "train": asdict(prepared.train.report),
            "eval": asdict(prepared.held_out.report) if prepared.held_out else None,
        },
        "auto": [asdict(choice) for choice in prepared.choices],
        "parameters": {"trainable": begun.trainable, "total": begun.total},
        "stop_token_ids": prepared.stop_ids,
        "steps": prepared.steps,
        "result": None,
    }


def _beginning(adapter: Adapter) -> dict[str, Any] | None:
    """The adapter that is trained on, by name and content."""
    source = begins_from(adapter)
    if source is None:
        return None
    folder = adapter_folder(Path(source))
    files = ("adapter_config.json", "adapter_model.safetensors")
    return {"folder": str(folder), "sha256": {name: sha256_of(folder / name) for name in files}}


def peak_memory() -> int:
    """The most memory that this process held, in bytes: the GPU's where one was used, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
