"""The JSON documents of `lorakit plan`: bytes, seconds, numbers."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.hardware.gpus import Gpu
    from lorakit.plan.advice import Advice
    from lorakit.plan.changes import Change
    from lorakit.plan.checkpoint import Checkpoint
    from lorakit.plan.estimate import Plan


@dataclass(frozen=True)
class PlanReport:
    """All that is shown of one plan."""

    plan: "Plan"
    full: "Plan | None"
    """Full fine-tuning, beside it."""
    checkpoint: "Checkpoint | None"
    """What the checkpoint's own quantization means, where it has one."""
    changes: "list[Change]"
    notes: "list[Advice]"
    probed: Any

    @property
    def merge(self) -> int | None:
        """Main memory of a merge; None where nothing can be merged. A quantized checkpoint is a whole model in float32
        while it is dequantized."""
        if self.checkpoint is None:
            return self.plan.merge
        whole = 4 * self.plan.spec.parameters
        return max(whole, self.plan.merge) if self.checkpoint.mergeable else None


def report_as_json(report: PlanReport) -> dict[str, Any]:
    """A plan as plain values: bytes, seconds, numbers."""
    document = _plan_as_json(report.plan)
    document["memory"]["merge"] = report.merge
    if report.merge is None:
        document["files"]["model"] = None
    checkpoint = asdict(report.checkpoint) if report.checkpoint else None
    if checkpoint:
        checkpoint |= {"lacking": checkpoint.pop("missing"), "said": checkpoint.pop("description")}
    return {
        **document,
        "checkpoint": checkpoint,
        "full_fine_tuning": _plan_as_json(report.full) if report.full else None,
        "changes": [_change_as_json(change) for change in report.changes],
        "advice": [asdict(note) for note in report.notes],
        "measured": asdict(report.probed) if report.probed is not None else None,
        "auto": [asdict(choice) for choice in report.plan.choices],
    }


def card_as_json(card: "Gpu", plan: "Plan | UserError") -> dict[str, Any]:
    """Whether one card can train a recipe."""
    if isinstance(plan, UserError):
        return {"name": card.name, "memory": card.memory, "fits": "no", "reason": str(plan)}
    train = plan.recipe.train
    return {
        "name": card.name,
        "memory": card.memory,
        "fits": plan.fits,
        "certain": plan.certain,
        "takes": plan.longest.total,
        "at_most": plan.at_most,
        "micro_batch": train.micro_batch,
        "gradient_checkpointing": train.gradient_checkpointing,
        "seconds": asdict(plan.time) if plan.time else None,
        "price": asdict(plan.price) if plan.price else None,
    }


def _plan_as_json(plan: "Plan") -> dict[str, Any]:
    machine, train = plan.place.machine, plan.recipe.train
    return {
        "model": plan.recipe.model.base,
        "counted": "meta device" if plan.spec.built else "config",
        "device": {"name": machine.name, "kind": machine.device, "memory": machine.memory, "planned_with": plan.room},
        "parameters": {
            "total": plan.spec.parameters,
            "trainable": plan.trainable.trained,
            "estimated": plan.trainable.estimated,
        },
        "settings": {
            "dtype": plan.recipe.model.dtype,
            "quantization": plan.recipe.model.quantization,
            "micro_batch": train.micro_batch,
            "gradient_checkpointing": train.gradient_checkpointing,
            "optimizer": train.optimizer,
        },
        "memory": {
            "longest": plan.longest.components | {"total": plan.longest.total, "moment": plan.longest.moment},
            "average": plan.average.components | {"total": plan.average.total, "moment": plan.average.moment},
            "evaluation": plan.evaluation,
            "merge": plan.merge,
            "error": plan.error,
            "at_most": plan.at_most,
        },
        "fits": plan.fits,
        "certain": plan.certain,
        "files": {"adapter": plan.adapter_file, "model": plan.model_file},
        "rows": {key: value for key, value in asdict(plan.rows).items() if key not in ("sample", "lengths")},
        "steps": plan.steps,
        "tokens": plan.tokens,
        "padding": plan.padding,
        "operations": plan.operations,
        "seconds": asdict(plan.time) if plan.time else None,
        "price": asdict(plan.price) if plan.price else None,
    }


def _change_as_json(change: "Change") -> dict[str, Any]:
    return {
        "set": {step.key: step.value for step in change.steps} | dict.fromkeys(change.removed),
        "options": change.overrides,
        "takes": change.plan.longest.total,
        "time": change.slower,
        "costs": change.costs,
    }
