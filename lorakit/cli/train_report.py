"""What `lorakit train` says before and after it trains."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lorakit.amounts import counted, decimal_bytes, duration, gibibytes, percent
from lorakit.cli.options import quoted
from lorakit.hardware.threads import describe_threads

if TYPE_CHECKING:
    from lorakit.data.report import Report
    from lorakit.prepare import Prepared
    from lorakit.progress import Progress
    from lorakit.run_dir import Run
    from lorakit.train.run import Outcome


def describe_run(prepared: "Prepared", progress: "Progress") -> None:
    """Report what `auto` became and what was read, before anything long begins."""
    from lorakit.cli.data_tables import count_draws
    from lorakit.plan.schedule import describe_schedule

    for choice in prepared.choices:
        progress.say(str(choice))
    _describe_rows("train", prepared.train.report, prepared.recipe.data.max_length, progress)
    if prepared.held_out:
        _describe_rows("held-out", prepared.held_out.report, prepared.recipe.data.max_length, progress)
    else:
        progress.warn(
            "no held-out rows (data.eval): no held-out loss is measured, the last adapter is kept whether or not it is "
            "the best, nothing stops early, and lorakit eval has no rows to score. data.eval: 0.1 holds a tenth out"
        )
    if prepared.recipe.output.export:
        progress.say(f"when training ends it is exported for {', '.join(prepared.recipe.output.export)}")
    _describe_memory(prepared, progress)
    if not prepared.machine.is_gpu and (threads := describe_threads()):
        progress.say(threads)
    for drawn in count_draws(prepared.train, prepared.recipe.train):
        if drawn.figures:
            progress.say(drawn.figures)
        if drawn.warning:
            progress.warn(drawn.warning)
    for line in describe_schedule(prepared.recipe.train, prepared.steps, prepared.held_out is not None):
        progress.say(line)


def _describe_rows(name: str, report: "Report", max_length: int, progress: "Progress") -> None:
    from lorakit.cli.data_tables import describe_cut, describe_rows

    progress.say(
        f"{name}: {report.used:,} of {report.read:,} rows, {report.tokens:,} tokens, {report.trained_tokens:,} of "
        f"them trained, longest row {report.longest}; {'; '.join(map(str, report.sources))}"
    )
    for text in describe_rows(report):
        progress.say(f"{name}: {text}")
    dropped, findings = report.dropped.lines("rows dropped:"), report.findings.lines("x")
    for text in (*describe_cut(report, max_length), *dropped, *findings):
        progress.warn(f"{name}: {text}")


def _describe_memory(prepared: "Prepared", progress: "Progress") -> None:
    from lorakit.plan.estimate import ERROR
    from lorakit.plan.memory import memory_budget

    expected, machine = prepared.expected, prepared.machine
    if expected is None:
        return
    text = f"memory: the longest micro-batch is predicted to take {gibibytes(expected.total)} of "
    text += f"{gibibytes(machine.memory)} {machine.place}"
    if expected.total > memory_budget(machine):
        progress.warn(f"{text}: it may run out. lorakit plan says what would fit")
    else:
        uncertain = expected.total * (1 + ERROR) > machine.memory
        progress.say(f"{text}, if the estimate holds: it may be off by {ERROR:.0%}" if uncertain else text)


def print_first_example(prepared: "Prepared") -> None:
    """The first example as the model sees it, the trained text in green or between marks."""
    from lorakit import console
    from lorakit.data.survey import decode_by_trained

    row = prepared.train.rows[0]
    stretches = decode_by_trained(prepared.tokenizer, row["input_ids"], row["labels"])
    console.result_masked(f"first example, {row['where']}:", stretches)


def plan_facts(prepared: "Prepared", progress: "Progress") -> dict[str, Any]:
    """What would be trained, for `--json`; how many parameters is said too."""
    from lorakit.train.setup import planned_parameters

    counts, text = planned_parameters(prepared), "known when the weights are loaded, by which adapter.layers chooses"
    if counts:
        text = "{:,} of {:,} ({})".format(*counts, percent(counts[0] / counts[1], 2))
    progress.say(f"trainable parameters: {text}")
    return {
        "steps": prepared.steps,
        "parameters": dict(zip(("trainable", "total"), counts, strict=True)) if counts else None,
        "auto": [asdict(choice) for choice in prepared.choices],
        "train": prepared.train.report.to_dict(),
        "eval": prepared.held_out.report.to_dict() if prepared.held_out else None,
    }


def print_outcome(outcome: "Outcome", run: "Run", prepared: "Prepared", whole: bool) -> None:
    """`whole`: the weights themselves were trained, and there is no adapter."""
    from lorakit import console
    from lorakit.model.quantization_config import stored_quantization

    lines = [f"trained {counted(outcome.steps, 'step')} in {duration(outcome.seconds)}"]
    if outcome.loss is not None:
        lines[0] += f", last loss {outcome.loss:.4f}"
    if outcome.eval_loss is not None:
        weights = "weights are" if whole else "adapter is"
        lines.append(f"held-out loss {outcome.eval_loss:.4f} at step {outcome.best_step}, whose {weights} kept")
    if outcome.reduced_bytes and outcome.seconds_a_step:
        share = percent(outcome.reduction_seconds / outcome.seconds_a_step)
        amount = decimal_bytes(outcome.reduced_bytes)
        lines.append(f"{outcome.devices} devices: adding up {amount} of gradients took about {share} of a step")
    if outcome.stopped_early:
        lines.append("stopped early: the held-out loss no longer fell (train.early_stopping)")
    lines.append(f"model: {run.model}" if whole else f"adapter: {run.adapter}")
    lines.append(f"next: lorakit eval {quoted(run.folder)}" + ("" if prepared.held_out else " --data FILE"))
    stored = stored_quantization(prepared.base.folder)
    made = run.merged.exists() or prepared.recipe.output.merged
    if not whole and not made and (stored is None or stored.reversible):
        lines[-1] += f"   or   lorakit merge {quoted(run.folder)}"
    console.result("\n".join(lines))
