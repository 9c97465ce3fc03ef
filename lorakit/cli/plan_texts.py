"""What `lorakit plan` prints: tables and sentences for people."""

from typing import TYPE_CHECKING, Any

from lorakit.amounts import decimal_bytes, duration, gibibyte_cell, gibibytes, percent, price
from lorakit.cli.plan_facts import Told, card_facts, facts_of
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


def print_plan(told: Told, as_json: bool) -> None:
    """Print one plan."""
    from lorakit import console

    if as_json:
        console.result_json(facts_of(told))
        return
    plan = told.plan
    _print_memory(plan, told.full)
    console.result_wrapped(_verdict(plan))
    console.result_facts(_figures(told))
    if told.probed is not None:
        console.result_wrapped(_measured(plan, told.probed))
    _print_changes(plan, told.changes)
    for note in told.notes:
        console.result_wrapped(f"- {note.about}: {note.text} ({note.source})", under="  ")
    for choice in plan.choices:
        console.result_wrapped(f"# {choice}", under="#   ")


def print_cards(devices: "list[Gpu]", plans: "list[Plan | UserError]", as_json: bool) -> None:
    """Print which of the known cards can train a recipe."""
    from lorakit import console

    if as_json:
        found = [card_facts(device, plan) for device, plan in zip(devices, plans, strict=True)]
        console.result_json({"cards": found})
        return
    both = sorted(zip(devices, plans, strict=True), key=lambda pair: (pair[0].memory, pair[0].name))
    rows = [_card_row(device, plan) for device, plan in both]
    console.result_table("", ["card", "GiB", "fits", "takes", "rows at once", "recomputing", "time"], rows)
    able = [
        (device.name, plan.certain) for device, plan in both if not isinstance(plan, UserError) and plan.fits == "yes"
    ]
    certain = [name for name, surely in able if surely]
    console.result(
        f"{len(able)} of {len(both)} known cards can train it{f', the smallest: {able[0][0]}' if able else ''}."
    )
    if able and len(certain) < len(able):
        smallest = f", the smallest: {certain[0]}" if certain else ""
        console.result(f"At the upper end of the estimate {len(certain)} can{smallest}.")


def _card_row(device: "Gpu", plan: "Plan | UserError") -> list[str]:
    size = f"{round(device.memory / 2**30, 1):g}"
    if isinstance(plan, UserError):
        return [device.name, size, "no", "-", "-", "-", "-"]
    if plan.fits == "no":
        return [device.name, size, "no", gibibytes(plan.longest.total), "-", "-", "-"]
    train, time = plan.recipe.train, duration(plan.time.likely) if plan.time else "-"
    recomputing = "yes" if train.gradient_checkpointing else "no"
    fits = "yes" if plan.certain else _ON_A_CARD[plan.fits]
    return [device.name, size, fits, gibibytes(plan.longest.total), str(train.micro_batch), recomputing, time]


def _print_memory(plan: "Plan", full: "Plan | None") -> None:
    from lorakit import console

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
    title = f"{plan.recipe.name}: {plan.recipe.model.base} on {machine.name}, {gibibytes(machine.memory)}"
    console.result(title)
    console.result_table("", columns, table)


def _verdict(plan: "Plan") -> str:
    machine = plan.place.machine
    held = "on the card" if machine.is_gpu else "free"
    verdict = (_CERTAIN if plan.certain else _UNCERTAIN)[plan.fits]
    moment = _MOMENTS.get(plan.longest.moment, plan.longest.moment)
    least = f"{gibibytes(plan.longest.total * (1 - plan.error))} to {gibibytes(plan.at_most)}"
    taken = f"{gibibytes(plan.longest.total)} ({least}, within {plan.error:.0%}) of {gibibytes(machine.memory)} {held}"
    return f"{verdict}: {taken}; budget {gibibytes(plan.room)}; peak during {moment}."


def _figures(told: Told) -> list[tuple[str, str]]:
    """The figures of a plan beside memory, each with its name."""
    plan, full, checkpoint = told.plan, told.full, told.checkpoint
    spec, adapted = plan.spec, plan.trainable
    how = "built without weights on torch's meta device" if spec.built else "counted from its config"
    near = "about " if adapted.estimated else ""
    rows = [("parameters", f"{spec.parameters:,}, {how}{_left_plain(plan)}")]
    if checkpoint:
        rows.append(("checkpoint", checkpoint.said))
    rows += [
        ("trained", f"{near}{adapted.trained:,} ({percent(adapted.trained / spec.parameters, 2)})"),
        ("files", _files(told)),
        ("evaluation", f"{gibibytes(plan.evaluation)} at its fullest"),
        ("merge", _merge(told)),
        ("rows", _rows(plan)),
    ]
    if plan.steps:
        about = "" if plan.recipe.train.steps or plan.rows.exact else "about "
        rows.append(("steps", f"{about}{plan.steps:,} of {plan.recipe.train.batch_size} rows"))
    if plan.tokens and plan.operations:
        rows.append(("work", f"{plan.tokens:,} tokens, {percent(plan.padding)} padding, {plan.operations:.2g} FLOPs"))
    rows.append(("time", _time(plan)))
    if plan.price:
        rows.append(("price", _span(plan.price, price)))
    if full:
        taken = (
            f"{gibibytes(full.longest.total)}, {full.trainable.trained:,} trained, "
            f"model {decimal_bytes(full.model_file)}"
        )
        time = f", {_span(full.time, duration)}" if full.time and full.fits != "no" else ", which does not fit"
        rows.append(("full fine-tuning", taken + (time if full.fits == "no" or full.time else "")))
    return rows


def _files(told: Told) -> str:
    plan = told.plan
    if not plan.adapter_file:
        return f"model {decimal_bytes(plan.model_file)}"
    adapter = f"adapter {decimal_bytes(plan.adapter_file)}"
    return adapter if told.merge is None else f"{adapter}, merged model {decimal_bytes(plan.model_file)}"


def _merge(told: Told) -> str:
    if told.merge is None:
        assert told.checkpoint is not None
        return f"none: to {told.checkpoint.quantization} weights no adapter can be added; it is served beside them"
    dequantized = ", the model dequantized as a whole" if told.checkpoint else ""
    return f"{gibibytes(told.merge)} of main memory, on any device{dequantized}"


def _left_plain(plan: "Plan") -> str:
    """A clause on fused experts under quantization: most of such a model, and left as it is."""
    fused = sum(weight.size for weight in plan.spec.weights if weight.fused)
    if not fused or plan.quantization == "none":
        return ""
    return f"; {percent(fused / plan.spec.parameters)} are fused experts, which bitsandbytes does not quantize"


def _rows(plan: "Plan") -> str:
    rows = plan.rows
    if rows.count is None:
        return rows.counted
    about = "" if rows.exact else "about "
    held_out = f", {rows.held_out:,} held out" if rows.held_out else ""
    over = f", {percent(rows.overlong, 1)} longer than data.max_length" if rows.overlong else ""
    long = f"{rows.mean:,.0f} tokens on average, at most {rows.longest:,}{over}"
    return f"{about}{rows.count:,}{held_out}; {long} ({rows.counted})"


def _time(plan: "Plan") -> str:
    if plan.time and plan.rates:
        return f"{_span(plan.time, duration)}; at {plan.rates.words}"
    if plan.steps is None:
        return "known with the rows"
    return f"not known: no speed of {plan.place.machine.name} in {plan.recipe.model.dtype} is known here"


def _measured(plan: "Plan", probed: Any) -> str:
    predicted = plan.longest.total
    pass_ = f"{probed.micro_batch} rows, {probed.tokens:,} tokens in {duration(probed.seconds)}"
    off = f"{predicted / probed.peak - 1:+.0%}"
    return f"measured: {gibibytes(probed.peak)} on {pass_}; predicted {gibibytes(predicted)} ({off})"


def _print_changes(plan: "Plan", changes: "list[Change]") -> None:
    from lorakit import console

    if not changes:
        if plan.fits != "yes":
            console.result_wrapped(
                "No change that is tried here makes it fit: take a smaller base model, or a larger card (--gpu all)."
            )
        return
    console.result("to make it fit, what costs least first:" if plan.fits != "yes" else "what would use the room:")
    for change in changes:
        console.result(f"  {change.overrides}")
        told = f"takes {gibibytes(change.plan.longest.total)}{_slower(change.slower)}: {change.costs}"
        console.result("\n".join(console.wrapped(told, under=" " * 8, begin=" " * 6)))


def _slower(times: float | None) -> str:
    return "" if times is None else f", time x {times:.2f}"


def _span(span: "EstimateRange | None", shown: Any) -> str:
    return "-" if span is None else f"{shown(span.likely)} ({shown(span.low)} to {shown(span.high)})"
