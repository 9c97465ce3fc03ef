"""Adapters that are to be combined: what has to be the same of them, and what is read of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import UserError
from lorakit.merge.low_rank import LowRankFactors
from lorakit.merge.peft_layout import AdapterLayer, adapter_tensors, lora_layers
from lorakit.model.layerwise import adapter_without_base
from lorakit.model.peft_adapter import adapter_config
from lorakit.progress import Progress
from lorakit.run_dir import Run

FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter's configuration, layers and tensors."""

    folder: Path
    config: Any
    layers: dict[str, AdapterLayer]
    """By what the names of their tensors begin with."""
    tensors: dict[str, torch.Tensor]

    def factors(self, stem: str) -> LowRankFactors:
        """Of the layer whose tensors' names begin so."""
        layer = self.layers[stem]
        a, b = (self.tensors[f"{stem}.lora_{side}.weight"].float() for side in "AB")
        return LowRankFactors(a, b, layer.scale, layer.experts)

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(self.factors(stem).rank for stem in self.layers)


def check_same_base(runs: Sequence[Run], progress: Progress) -> None:
    """Refuse runs whose adapters cannot be combined, and say what else differs between them.

    Raises:
        UserError: a run has no adapter, or another base than the first.
    """
    manifests = [run.read_manifest() for run in runs]
    for run in runs:
        if not (run.adapter / FILES[0]).is_file():
            raise UserError(f"{run.folder}: has no adapter to combine. Give runs that trained one.")
    first, bases = manifests[0], [_weights(manifest) for manifest in manifests]
    for run, manifest, base in zip(runs[1:], manifests[1:], bases[1:], strict=True):
        if base != bases[0]:
            raise UserError(
                f"{run.folder}: was trained on other base weights ({manifest['base'].get('name')}) than "
                f"{runs[0].folder} ({first['base'].get('name')}). Adapters of different bases cannot be combined."
            )
        ours, its = first["base"].get("quantization"), manifest["base"].get("quantization")
        if its != ours:
            progress.warn(
                f"{run.folder} was trained on the base in {its}, {runs[0].folder} in {ours}: each adapter also makes "
                "up for what its own quantization lost"
            )
        if manifest.get("tokenizer_sha256") != first.get("tokenizer_sha256"):
            progress.warn(
                f"{run.folder} was trained with another tokenizer or chat template than {runs[0].folder}, whose own "
                "the combined adapter gets"
            )
        ours, its = (one.get("template_variables") or {} for one in (first, manifest))
        if its != ours:
            progress.warn(
                f"{run.folder} was trained with model.template_variables {its}, {runs[0].folder} with {ours}: ask the "
                "combined adapter in one of these ways"
            )


def _weights(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: sha for name, sha in manifest["base"]["sha256"].items() if name.endswith(".safetensors")}


def open_adapter(folder: Path, base_folder: Path) -> OpenAdapter:
    """One adapter with its tensors.

    Raises:
        UserError: it is none, is damaged, belongs to another model, or has parts that no method combines.
    """
    config = adapter_config(folder)
    _refuse_uncombinable(folder, _uncombinable(config))
    model, brought = adapter_without_base(base_folder, folder)
    config, tensors = model.peft_config["default"], adapter_tensors(model)
    odd = next((name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))), None)
    odd = odd or next(iter(brought), None)
    lost = f"holds {odd}, which would be lost: only A and B of linear layers are combined" if odd else ""
    _refuse_uncombinable(folder, lost)
    broken = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if broken:
        raise UserError(f"{folder}: holds numbers that are not finite, the first in {broken}. It is not combined.")
    return OpenAdapter(folder, config, {layer.stem: layer for layer in lora_layers(model)}, tensors)


def _refuse_uncombinable(folder: Path, reason: str) -> None:
    if reason:
        raise UserError(f"{folder}: {reason}. Merge it into the base on its own: lorakit merge RUN.")


def _uncombinable(config: Any) -> str:
    """Why an adapter has parts that a combination of A and B would drop; nothing where its configuration has none."""
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        return f"is of PEFT's kind {config.peft_type}, and only LoRA adapters are combined"
    if config.use_dora:
        return "is a DoRA adapter, whose magnitudes belong to its own A and B and cannot be combined"
    if config.modules_to_save:
        names = ", ".join(sorted(config.modules_to_save))
        return f"brings modules trained whole ({names}), which would be lost: only low-rank changes are combined"
    return ""


def check_experts(opened: list[OpenAdapter]) -> None:
    """PEFT names the tensors of fused experts by how many of their weights are adapted, so these must be the same."""
    sets = [{layer.path for layer in one.layers.values() if layer.is_parameter} for one in opened]
    first = next((at for at, some in enumerate(sets) if some), None)
    for at, some in enumerate(sets):
        if first is not None and some and some != sets[first]:
            odd = min(some ^ sets[first])
            raise UserError(
                f"{opened[at].folder}: adapts other fused weights of experts than {opened[first].folder}, such as "
                f"{odd}: PEFT holds them in one adapter only where all have the same."
            )
