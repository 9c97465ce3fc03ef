"""What `lorakit plan` prints: tables and sentences for people, one document for programs (bytes, seconds, numbers)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit import console
from lorakit.amounts import decimal_bytes, duration, gibibyte_cell, gibibytes, percent, price
from lorakit.cli.plan_devices import describe_devices, devices_as_json, share_of_device
from lorakit.errors import UserError
from lorakit.model.quantization_config import missing_packages
from lorakit.plan.memory import describe_checkpoint
from lorakit.plan.runtime import training_flops

if TYPE_CHECKING:
    from lorakit.hardware.gpus import Gpu
    from lorakit.model.quantization_config import CheckpointQuantization
    from lorakit.plan.advice import Advice
    from lorakit.plan.changes import Change
    from lorakit.plan.estimate import Plan, RowEstimate
    from lorakit.plan.runtime import EstimateRange

_CERTAIN = {"yes": "It fits", "tight": "It fits", "no": "It does not fit"}
_UNCERTAIN = {
    "yes": "It fits, if the estimate holds",
    "tight": "It may not fit",
    "no": "It does not fit, if the estimate holds",
}
_MOMENTS = {
    "loss": "the loss",
    "backward": "the backward pass",
    "backward of attention": "the backward pass of attention",
    "end of the backward pass": "the end of the backward pass",
    "trying the loss": "the trial of the loss",
}


@dataclass(frozen=True)
class PlanReport:
    """All that is shown of one plan."""

    plan: "Plan"
    full: "Plan | None"  # full fine-tuning, beside it
    checkpoint: "CheckpointQuantization | None"  # the quantization that the weights have on disk
    changes: "list[Change]"
    notes: "list[Advice]"
    probed: Any
    fewer: "list[Plan]"  # the same run on one of several devices, on two, on four ...

    @property
    def alone(self) -> "Plan | None":
        return self.fewer[0] if self.fewer else None

    @property
    def merge(self) -> int | None:
        """Main memory of a merge; None where nothing can be merged. A quantized checkpoint is a whole model in float32
        while it is dequantized."""
        if self.checkpoint is None:
            return self.plan.merge
        return max(4 * self.plan.spec.parameters, self.plan.merge) if self.checkpoint.reversible else None


def print_plan(report: PlanReport, as_json: bool) -> None:
    """Print one plan."""
    if as_json:
        console.result_json(_report_as_json(report))
        return
    plan = report.plan
    _print_memory(plan, report.full)
    console.result_wrapped(_verdict(plan))
    console.result_facts(_figures(report))
    if report.probed is not None:
        probed, predicted = report.probed, plan.longest.total
        console.result_wrapped(
            f"measured: {gibibytes(probed.peak)} on {probed.micro_batch} rows, {probed.tokens:,} tokens in "
            f"{duration(probed.seconds)}; predicted {gibibytes(predicted)} ({predicted / probed.peak - 1:+.0%})"
        )
    _print_changes(plan.fits == "yes", report.changes)
    for note in report.notes:
        console.result_wrapped(f"- {note.about}: {note.text} ({note.source})", under="  ")
    for choice in plan.choices:
        console.result_wrapped(f"# {choice}", under="#   ")


def print_cards(cards: "list[Gpu]", plans: "list[Plan | UserError]", as_json: bool, count: int) -> None:
    """Print which of the known cards can train a recipe, `count` of them together."""
    pairs = list(zip(cards, plans, strict=True))
    if as_json:
        console.result_json({"cards": [_card_as_json(card, plan) for card, plan in pairs]})
        return
    pairs.sort(key=lambda pair: (pair[0].memory, pair[0].name))
    rows = [[card.name, f"{round(card.memory / 2**30, 1):g}", *_card_cells(plan)] for card, plan in pairs]
    console.result_table("", ["card", "GiB", "fits", "takes", "rows at once", "recomputing", "time"], rows)
    fitting = [(card.name, plan) for card, plan in pairs if not isinstance(plan, UserError) and plan.fits == "yes"]
    certain = [name for name, plan in fitting if plan.certain]
    smallest = f", the smallest: {fitting[0][0]}" if fitting else ""
    each = f", {count} together" if count > 1 else ""
    console.result(f"{len(fitting)} of {len(pairs)} known cards can train it{each}{smallest}.")
    if len(certain) < len(fitting):
        smallest = f", the smallest: {certain[0]}" if certain else ""
        console.result(f"At the upper end of the estimate {len(certain)} can{smallest}.")


def _card_cells(plan: "Plan | UserError") -> list[str]:
    if isinstance(plan, UserError) or plan.fits == "no":
        return ["no", "-" if isinstance(plan, UserError) else gibibytes(plan.longest.total), "-", "-", "-"]
    train, fits = plan.recipe.train, "yes" if plan.certain else {"yes": "probably", "tight": "perhaps"}[plan.fits]
    recomputing, time = "yes" if train.gradient_checkpointing else "no", plan.time
    cells = [fits, gibibytes(plan.longest.total), str(train.micro_batch), recomputing]
    return [*cells, duration(time.likely) if time else "-"]


def _print_memory(plan: "Plan", full: "Plan | None") -> None:
    rows = int(plan.recipe.train.micro_batch)
    several = plan.devices.count > 1
    columns = [
        "GiB on each device" if several else "GiB",
        f"longest: {rows} x {plan.rows.longest:,}",
        f"average: {rows} x {plan.rows.mean:,.0f}",
    ]
    memories = [plan.longest, plan.average]
    if full:
        columns.append("full fine-tuning")
        memories.append(full.longest)
    table = [
        [name, *(gibibyte_cell(memory.components[name]) for memory in memories)]
        for name in plan.longest.components
        if any(memory.components[name] for memory in memories)
    ]
    table.append(["total", *(gibibyte_cell(memory.total) for memory in memories)])
    if several:
        columns.append("of the whole")
        table = [[*row, share_of_device(plan, row[0])] for row in table[:-1]] + [[*table[-1], ""]]
    machine = plan.machine
    where = f"{plan.devices.count} x {machine.name}, {gibibytes(machine.memory)} each" if several else ""
    where = where or f"{machine.name}, {gibibytes(machine.memory)}"
    console.result(f"{plan.recipe.name}: {plan.recipe.model.base} on {where}")
    console.result_table("", columns, table)


def _verdict(plan: "Plan") -> str:
    machine, total = plan.machine, plan.longest.total
    verdict = (_CERTAIN if plan.certain else _UNCERTAIN)[plan.fits]
    moment = _MOMENTS.get(plan.longest.moment, plan.longest.moment)
    span = f"{gibibytes(total * (1 - plan.error))} to {gibibytes(plan.at_most)}, within {plan.error:.0%}"
    each = {"on the card": "on each card", "free": "free for each process"} if plan.devices.count > 1 else {}
    available = f"{gibibytes(machine.memory)} {each.get(machine.place, machine.place)}"
    return (
        f"{verdict}: {gibibytes(total)} ({span}) of {available}; budget {gibibytes(plan.room)}; peak during {moment}."
    )


def _figures(report: PlanReport) -> list[tuple[str, str]]:
    plan, full, spec, trainable = report.plan, report.full, report.plan.spec, report.plan.trainable
    how = "built without weights on torch's meta device" if spec.built else "counted from its config"
    fused = sum(weight.size for weight in spec.weights if weight.fused)
    if fused and plan.load.quantization != "none":
        how += f"; {percent(fused / spec.parameters)} are fused experts, which bitsandbytes does not quantize"
    rows = {"parameters": f"{spec.parameters:,}, {how}"}
    if report.checkpoint:
        rows["checkpoint"] = describe_checkpoint(report.checkpoint, plan.machine)
    about = "about " if trainable.estimated else ""
    rows["trained"] = f"{about}{trainable.trained:,} ({percent(trainable.trained / spec.parameters, 2)})"
    if trainable.token_rows:
        rows["trained"] += f", {trainable.token_rows:,} of them the rows of new tokens"
    rows["files"] = f"model {decimal_bytes(plan.model_file)}"
    if plan.adapter_file:
        merged = "" if report.merge is None else f", merged {rows['files']}"
        rows["files"] = f"adapter {decimal_bytes(plan.adapter_file)}{merged}"
    rows["evaluation"] = f"peak {gibibytes(plan.evaluation)}"
    dequantized = ", the whole model dequantized" if report.checkpoint else ""
    rows["merge"] = f"{gibibytes(report.merge or 0)} of main memory, on any device{dequantized}"
    if report.merge is None and report.checkpoint:
        quantization = report.checkpoint.quantization
        rows["merge"] = f"none: no adapter can be added to {quantization} weights; serve the adapter beside them"
    if plan.offloaded:
        each = " for each device" if plan.devices.count > 1 else ""
        rows["activations"] = f"{gibibytes(plan.offloaded)} in main memory{each}, and up to twice that as it is pinned"
    rows["rows"] = _rows(plan.rows)
    if plan.steps:
        about = "" if plan.recipe.train.steps or plan.rows.exact else "about "
        rows["steps"] = f"{about}{plan.steps:,} of {plan.recipe.train.batch_size} rows"
    if plan.work:
        operations = training_flops(plan.work)
        rows["work"] = f"{plan.work.tokens:,} tokens, {percent(plan.padding)} padding, {operations:.2g} FLOPs"
    rows |= describe_devices(plan, report.alone)
    rows["time"] = f"not known: no speed of {plan.machine.name} in {plan.recipe.model.dtype} is known here"
    if plan.time and plan.rates:
        rows["time"] = f"{_range(plan.time, duration)}; at {plan.rates.words}"
    elif plan.steps is None:
        rows["time"] = "known with the rows"
    if plan.price:
        every = f", for all {plan.devices.count} devices" if plan.devices.count > 1 else ""
        rows["price"] = _range(plan.price, price) + every
    if full:
        time = f", {_range(full.time, duration)}" if full.time else ""
        end = ", which does not fit" if full.fits == "no" else time
        sizes = f"{gibibytes(full.longest.total)}, {full.trainable.trained:,} trained"
        rows["full fine-tuning"] = f"{sizes}, model {decimal_bytes(full.model_file)}{end}"
    return list(rows.items())


def _rows(rows: "RowEstimate") -> str:
    if rows.count is None:
        return rows.counted
    about = "" if rows.exact else "about "
    held_out = f", {rows.held_out:,} held out" if rows.held_out else ""
    overlong = f", {percent(rows.overlong, 1)} longer than data.max_length" if rows.overlong else ""
    tokens = f"{rows.mean:,.0f} tokens on average, at most {rows.longest:,}{overlong}"
    return f"{about}{rows.count:,}{held_out}; {tokens} ({rows.counted})"


def _range(estimate: "EstimateRange", show: Callable[[float], str]) -> str:
    return f"{show(estimate.likely)} ({show(estimate.low)} to {show(estimate.high)})"


def _print_changes(fits: bool, changes: "list[Change]") -> None:
    if changes:
        console.result("what would use the memory that is left:" if fits else "to make it fit, what costs least first:")
    elif not fits:
        console.result_wrapped(
            "No change that was tried makes it fit: take a smaller base model, a larger card (--gpu all), or several "
            "(--devices)."
        )
    for change in changes:
        console.result(f"  {change.overrides}")
        slower = "" if change.slower is None else f", time x {change.slower:.2f}"
        effect = f"takes {gibibytes(change.plan.longest.total)}{slower}: {change.costs}"
        console.result_wrapped(effect, under=" " * 8, begin=" " * 6)


def _report_as_json(report: PlanReport) -> dict[str, Any]:
    document = _plan_as_json(report.plan) | {"devices": devices_as_json(report.plan, report.alone)}
    document["memory"]["merge"] = report.merge
    if report.merge is None:
        document["files"]["model"] = None
    checkpoint: dict[str, Any] | None = None
    if stored := report.checkpoint:
        checkpoint = {"quantization": stored.quantization, "treatment": stored.treatment}
        checkpoint |= {"mergeable": stored.reversible, "lacking": missing_packages(stored)}
        checkpoint["said"] = describe_checkpoint(stored, report.plan.machine)
    changes = [
        {
            "set": {step.key: step.value for step in change.steps} | dict.fromkeys(change.removed),
            "options": change.overrides,
            "takes": change.plan.longest.total,
            "time": change.slower,
            "costs": change.costs,
        }
        for change in report.changes
    ]
    return {
        **document,
        "checkpoint": checkpoint,
        "full_fine_tuning": _plan_as_json(report.full) if report.full else None,
        "changes": changes,
        "advice": [asdict(note) for note in report.notes],
        "measured": asdict(report.probed) if report.probed is not None else None,
        "auto": [asdict(choice) for choice in report.plan.choices],
    }


def _card_as_json(card: "Gpu", plan: "Plan | UserError") -> dict[str, Any]:
    document: dict[str, Any] = {"name": card.name, "memory": card.memory, "fits": "no"}
    if isinstance(plan, UserError):
        return document | {"reason": str(plan)}
    train, whole = plan.recipe.train, _plan_as_json(plan)
    document |= {"fits": plan.fits, "certain": plan.certain, "takes": plan.longest.total, "at_most": plan.at_most}
    document |= {"micro_batch": train.micro_batch, "gradient_checkpointing": train.gradient_checkpointing}
    return document | {key: whole[key] for key in ("seconds", "price")}


def _plan_as_json(plan: "Plan") -> dict[str, Any]:
    machine, spec, trainable = plan.machine, plan.spec, plan.trainable
    model, train = plan.recipe.model, plan.recipe.train
    longest, average = (memory.to_dict() | {"moment": memory.moment} for memory in (plan.longest, plan.average))
    return {
        "model": model.base,
        "counted": "meta device" if spec.built else "config",
        "device": {"name": machine.name, "kind": machine.device, "memory": machine.memory, "planned_with": plan.room},
        "parameters": {
            "total": spec.parameters,
            "trainable": trainable.trained,
            "token_rows": trainable.token_rows,
            "estimated": trainable.estimated,
        },
        "settings": {key: getattr(model, key) for key in ("dtype", "quantization")}
        | {key: getattr(train, key) for key in ("micro_batch", "gradient_checkpointing", "sharding", "optimizer")},
        "memory": {"longest": longest, "average": average}
        | {key: getattr(plan, key) for key in ("evaluation", "merge", "offloaded", "error", "at_most")},
        **{key: getattr(plan, key) for key in ("fits", "certain")},
        "files": {"adapter": plan.adapter_file, "model": plan.model_file},
        "rows": {key: value for key, value in asdict(plan.rows).items() if key not in ("sample", "lengths")},
        "steps": plan.steps,
        "tokens": plan.work.tokens if plan.work else None,
        "padding": plan.padding,
        "operations": training_flops(plan.work) if plan.work else None,
        "seconds": asdict(plan.time) if plan.time else None,
        "price": asdict(plan.price) if plan.price else None,
    }
