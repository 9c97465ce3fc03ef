"""`lorakit sweep`"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.amounts import counted
from lorakit.cli.options import Json, Quiet
from lorakit.errors import LorakitError, UserError

if TYPE_CHECKING:
    from lorakit.sweep.ranking import SweepRanking
    from lorakit.sweep.study import TrialStore
    from lorakit.sweep.sweep_file import Sweep


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The sweep, a YAML file.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Its folder, by default runs/NAME.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="TIME", help="Begin no trial after this time, such as 2h, 90min or 45s."),
    ] = None,
    devices: Annotated[
        int,
        typer.Option("--devices", metavar="N", min=1, help="Do so many trials at once, each on a GPU, or a process."),
    ] = 1,
    rank: Annotated[bool, typer.Option("--rank", help="Train nothing: rank the trials that have ended.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one recipe with other values for some keys, and rank the runs by held-out loss.

    The file extends a recipe and gives lists or ranges: [cyan]train.learning_rate: [1e-4, 3e-4, 1e-3][/cyan]. Trials
    that are behind are cut short. Stopped or killed, the same command goes on; started again elsewhere on the same
    folder, it takes trials beside the first. The recipe of the winner is written as best.yaml.
    """
    from lorakit import console
    from lorakit.sweep.sweep_file import load_sweep, parse_duration

    seconds = parse_duration(budget) if budget is not None else None
    if budget is not None and seconds is None:
        raise UserError(f"--budget: {budget!r} is not a time. Write for example 2h, 90min or 45s.")
    loaded = load_sweep(file)
    folder = output or Path("runs") / loaded.name
    from lorakit.sweep.run import describe_state
    from lorakit.sweep.study import TrialStore

    store = TrialStore(loaded, folder)
    if not rank:
        _work(loaded, store, file, seconds or loaded.budget, devices, quiet)
        under_way = sum(trial.state.name == "RUNNING" for trial in store.trials)
        if under_way and not as_json:  # ranking scores rows: the last worker does it
            what = f"{counted(under_way, 'trial')} under way: the last worker ranks"
            console.result(f"{folder}: {what}. --rank ranks what has ended")
            return
    from lorakit.sweep.ranking import rank_trials, write_ranking

    ranking = rank_trials(store, console.Terminal(quiet=True))
    best = write_ranking(loaded, store, ranking)
    if as_json:
        console.result_json({"folder": str(folder), **ranking.to_dict(), "best": str(best) if best else None})
        return
    console.result(f"{folder}: {describe_state(store)}, {ranking.steps:,} steps in all")
    _print(ranking)
    if best:
        console.result(f"recommended: {best}   next: lorakit train {best}")
    if ranking.trials and all(trial.state == "failed" for trial in ranking.trials):
        raise LorakitError(f"every trial failed; the first: {ranking.trials[0].reason}")


def _work(sweep: "Sweep", store: "TrialStore", file: Path, seconds: float | None, devices: int, quiet: bool) -> None:
    from lorakit import console
    from lorakit.sweep.run import describe_state, run_worker

    progress = console.Terminal(quiet)
    if store.trials:
        progress.say(f"{store.folder}: {describe_state(store)}")
    if devices > 1:
        _start_workers(store, file, seconds, devices, quiet)
        return
    deadline = None if seconds is None else time.monotonic() + seconds
    run_worker(sweep, store, progress, lambda: console.Terminal(quiet=True), deadline)


def _start_workers(store: "TrialStore", file: Path, seconds: float | None, devices: int, quiet: bool) -> None:
    """A process for each device, which takes trials as one started by hand would."""
    from lorakit.hardware.machine import usable_machine
    from lorakit.progress import Silent

    command = [sys.executable, "-m", "lorakit", "sweep", str(file), "--output", str(store.folder)]
    command += ["--budget", f"{seconds:g}s"] if seconds is not None else []
    command += ["--quiet"] if quiet else []
    gpus = _visible_gpus() if usable_machine(Silent()).is_gpu else []
    if gpus and devices > len(gpus):
        raise UserError(f"--devices {devices}: this machine has {counted(len(gpus), 'GPU')}. Write no more.")
    threads = max(1, (os.cpu_count() or 1) // devices)
    workers = []
    for number in range(devices):
        own = {"CUDA_VISIBLE_DEVICES": gpus[number]} if gpus else {"OMP_NUM_THREADS": str(threads)}
        own_session: dict[str, Any] = {"stdout": subprocess.DEVNULL, "start_new_session": True}
        workers.append(subprocess.Popen(command, env={**os.environ, **own}, **own_session))
    codes = _wait(workers)
    if all(codes) and (not store.trials or any(one.state.name in ("RUNNING", "WAITING") for one in store.trials)):
        raise LorakitError(
            f"every worker ended with an error (exit codes {', '.join(map(str, codes))}; it is said above). The same "
            "command goes on where they stopped."
        )


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[: torch.cuda.device_count()] or list(map(str, range(torch.cuda.device_count())))


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Their exit codes. Ctrl-C and SIGTERM are passed on: each worker writes its checkpoint before it ends."""
    try:
        return [worker.wait() for worker in workers]
    except KeyboardInterrupt:
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        try:
            for worker in workers:
                worker.wait()
        except KeyboardInterrupt:
            for worker in workers:
                worker.kill()
        raise


def _print(ranking: "SweepRanking") -> None:
    from lorakit import console
    from lorakit.amounts import format_difference, percent
    from lorakit.sweep.sweep_file import describe_values

    rows = []
    for place, one in enumerate(ranking.candidates, start=1):
        against = one.against_best
        verdict = "" if place == 1 else "-"
        if against is not None and place > 1:
            ends = against.interval
            between = f" ({ends.low:+.4f} to {ends.high:+.4f})" if ends else ""
            verdict = f"{format_difference(against.difference, 'nats')}{between}, {against.verdict}"
        mark = "take this" if one is ranking.recommended else ""
        parameters = "-" if one.parameters is None else f"{one.parameters:,}"
        rows.append([str(place), describe_values(one.values), f"{one.loss:.4f}", verdict, parameters, mark])
    columns = ["", "values", "held-out loss", "against the first", "parameters", ""]
    if rows:
        console.result_table("ranking", columns, rows, whole_lines=True)
    for state in ("cut short", "failed", "under way", "waiting"):
        of = [trial for trial in ranking.trials if trial.state == state]
        if of and state == "failed":
            for trial in of:
                console.result_wrapped(f"failed: {describe_values(trial.values)}: {trial.reason}", under="  ")
        elif of and state != "waiting":
            named = "; ".join(
                describe_values(one.values) + (f" (loss {one.loss:.4f} at step {one.steps})" if one.loss else "")
                for one in of
            )
            console.result_wrapped(f"{state}: {named}", under="  ")
    if ranking.importance:
        shares = ", ".join(f"{key} {percent(share)}" for key, share in ranking.importance.items())
        console.result(f"what the loss depends on: {shares}")
    if ranking.noise is not None:
        console.result(f"seeds alone change the loss by {ranking.noise:.4f} (standard deviation)")
    if ranking.candidates:
        console.result(ranking.in_words())
