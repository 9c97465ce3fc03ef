"""What `lorakit plan` prints: tables and sentences for people."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from lorakit import console
from lorakit.amounts import decimal_bytes, duration, gibibyte_cell, gibibytes, percent, price
from lorakit.cli.plan_facts import PlanReport, card_as_json, report_as_json
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.hardware.gpus import Gpu
    from lorakit.plan.changes import Change
    from lorakit.plan.estimate import Plan
    from lorakit.plan.runtime import EstimateRange

_CERTAIN = {"yes": "It fits", "tight": "It fits", "no": "It does not fit"}
_UNCERTAIN = {
    "yes": "It fits, if the estimate holds",
    "tight": "It may not fit",
    "no": "It does not fit, if the estimate holds",
}
_ON_A_CARD = {"yes": "probably", "tight": "perhaps"}
_MOMENTS = {
    "loss": "the loss",
    "backward": "the backward pass",
    "backward of attention": "the backward pass of attention",
    "end of the backward pass": "the end of the backward pass",
    "trying the loss": "the trial of the loss",
}


def print_plan(report: PlanReport, as_json: bool) -> None:
    """Print one plan."""
    if as_json:
        console.result_json(report_as_json(report))
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
    _print_changes(plan, report.changes)
    for note in report.notes:
        console.result_wrapped(f"- {note.about}: {note.text} ({note.source})", under="  ")
    for choice in plan.choices:
        console.result_wrapped(f"# {choice}", under="#   ")


def print_cards(cards: "list[Gpu]", plans: "list[Plan | UserError]", as_json: bool) -> None:
    """Print which of the known cards can train a recipe."""
    pairs = list(zip(cards, plans, strict=True))
    if as_json:
        console.result_json({"cards": [card_as_json(card, plan) for card, plan in pairs]})
        return
    pairs.sort(key=lambda pair: (pair[0].memory, pair[0].name))
    rows = [_card_row(card, plan) for card, plan in pairs]
    console.result_table("", ["card", "GiB", "fits", "takes", "rows at once", "recomputing", "time"], rows)
    fitting = [(card, plan) for card, plan in pairs if not isinstance(plan, UserError) and plan.fits == "yes"]
    certain = [card.name for card, plan in fitting if plan.certain]
    smallest = f", the smallest: {fitting[0][0].name}" if fitting else ""
    console.result(f"{len(fitting)} of {len(pairs)} known cards can train it{smallest}.")
    if len(certain) < len(fitting):
        smallest = f", the smallest: {certain[0]}" if certain else ""
        console.result(f"At the upper end of the estimate {len(certain)} can{smallest}.")


def _card_row(card: "Gpu", plan: "Plan | UserError") -> list[str]:
    size = f"{round(card.memory / 2**30, 1):g}"
    if isinstance(plan, UserError):
        return [card.name, size, "no", "-", "-", "-", "-"]
    takes = gibibytes(plan.longest.total)
    if plan.fits == "no":
        return [card.name, size, "no", takes, "-", "-", "-"]
    fits = "yes" if plan.certain else _ON_A_CARD[plan.fits]
    recomputing = "yes" if plan.recipe.train.gradient_checkpointing else "no"
    time = duration(plan.time.likely) if plan.time else "-"
    return [card.name, size, fits, takes, str(plan.recipe.train.micro_batch), recomputing, time]


def _print_memory(plan: "Plan", full: "Plan | None") -> None:
    rows = int(plan.recipe.train.micro_batch)
    columns = ["GiB", f"longest: {rows} x {plan.rows.longest:,}", f"average: {rows} x {plan.rows.mean:,.0f}"]
    memories = [plan.longest, plan.average]
    if full:
        columns.append("full fine-tuning")
        memories.append(full.longest)
    names = [name for name in plan.longest.components if any(memory.components[name] for memory in memories)]
    table = [[name, *(gibibyte_cell(memory.components[name]) for memory in memories)] for name in names]
    table.append(["total", *(gibibyte_cell(memory.total) for memory in memories)])
    machine = plan.place.machine
    console.result(f"{plan.recipe.name}: {plan.recipe.model.base} on {machine.name}, {gibibytes(machine.memory)}")
    console.result_table("", columns, table)


def _verdict(plan: "Plan") -> str:
    machine, total = plan.place.machine, plan.longest.total
    verdict = (_CERTAIN if plan.certain else _UNCERTAIN)[plan.fits]
    moment = _MOMENTS.get(plan.longest.moment, plan.longest.moment)
    span = f"{gibibytes(total * (1 - plan.error))} to {gibibytes(plan.at_most)}, within {plan.error:.0%}"
    available = f"{gibibytes(machine.memory)} {'on the card' if machine.is_gpu else 'free'}"
    return (
        f"{verdict}: {gibibytes(total)} ({span}) of {available}; budget {gibibytes(plan.room)}; peak during {moment}."
    )


def _figures(report: PlanReport) -> list[tuple[str, str]]:
    """The figures of a plan beside memory, each with its name."""
    plan, full, checkpoint = report.plan, report.full, report.checkpoint
    spec, trainable = plan.spec, plan.trainable
    how = "built without weights on torch's meta device" if spec.built else "counted from its config"
    fused = sum(weight.size for weight in spec.weights if weight.fused)
    if fused and plan.quantization != "none":
        how += f"; {percent(fused / spec.parameters)} are fused experts, which bitsandbytes does not quantize"
    rows = [("parameters", f"{spec.parameters:,}, {how}")]
    if checkpoint:
        rows.append(("checkpoint", checkpoint.description))
    about = "about " if trainable.estimated else ""
    rows += [
        ("trained", f"{about}{trainable.trained:,} ({percent(trainable.trained / spec.parameters, 2)})"),
        ("files", _files(report)),
        ("evaluation", f"peak {gibibytes(plan.evaluation)}"),
        ("merge", _merge(report)),
        ("rows", _rows(plan)),
    ]
    if plan.steps:
        about = "" if plan.recipe.train.steps or plan.rows.exact else "about "
        rows.append(("steps", f"{about}{plan.steps:,} of {plan.recipe.train.batch_size} rows"))
    if plan.tokens and plan.operations:
        rows.append(("work", f"{plan.tokens:,} tokens, {percent(plan.padding)} padding, {plan.operations:.2g} FLOPs"))
    rows.append(("time", _time(plan)))
    if plan.price:
        rows.append(("price", _range(plan.price, price)))
    if full:
        figures = f"{gibibytes(full.longest.total)}, {full.trainable.trained:,} trained, "
        figures += f"model {decimal_bytes(full.model_file)}"
        if full.fits == "no":
            figures += ", which does not fit"
        elif full.time:
            figures += f", {_range(full.time, duration)}"
        rows.append(("full fine-tuning", figures))
    return rows


def _files(report: PlanReport) -> str:
    plan = report.plan
    if not plan.adapter_file:
        return f"model {decimal_bytes(plan.model_file)}"
    adapter = f"adapter {decimal_bytes(plan.adapter_file)}"
    return adapter if report.merge is None else f"{adapter}, merged model {decimal_bytes(plan.model_file)}"


def _merge(report: PlanReport) -> str:
    if report.merge is None:
        assert report.checkpoint is not None
        quantization = report.checkpoint.quantization
        return f"none: no adapter can be added to {quantization} weights; serve the adapter beside them"
    dequantized = ", the whole model dequantized" if report.checkpoint else ""
    return f"{gibibytes(report.merge)} of main memory, on any device{dequantized}"


def _rows(plan: "Plan") -> str:
    rows = plan.rows
    if rows.count is None:
        return rows.counted
    about = "" if rows.exact else "about "
    held_out = f", {rows.held_out:,} held out" if rows.held_out else ""
    overlong = f", {percent(rows.overlong, 1)} longer than data.max_length" if rows.overlong else ""
    tokens = f"{rows.mean:,.0f} tokens on average, at most {rows.longest:,}{overlong}"
    return f"{about}{rows.count:,}{held_out}; {tokens} ({rows.counted})"


def _time(plan: "Plan") -> str:
    if plan.time and plan.rates:
        return f"{_range(plan.time, duration)}; at {plan.rates.words}"
    if plan.steps is None:
        return "known with the rows"
    return f"not known: no speed of {plan.place.machine.name} in {plan.recipe.model.dtype} is known here"


def _print_changes(plan: "Plan", changes: "list[Change]") -> None:
    fits = plan.fits == "yes"
    if changes:
        console.result("what would use the memory that is left:" if fits else "to make it fit, what costs least first:")
    elif not fits:
        console.result_wrapped(
            "No change that was tried makes it fit: take a smaller base model, or a larger card (--gpu all)."
        )
    for change in changes:
        console.result(f"  {change.overrides}")
        slower = "" if change.slower is None else f", time x {change.slower:.2f}"
        effect = f"takes {gibibytes(change.plan.longest.total)}{slower}: {change.costs}"
        console.result("\n".join(console.wrapped(effect, under=" " * 8, begin=" " * 6)))


def _range(estimate: "EstimateRange", show: Callable[[float], str]) -> str:
    return f"{show(estimate.likely)} ({show(estimate.low)} to {show(estimate.high)})"
