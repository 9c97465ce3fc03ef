"""`python -m tools.torture`: run the parts, print what was tried and what held, and keep what did not."""

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tools.torture.cases import Part, Result, run_part
from tools.torture.command import SHIM, compile_shim

PARTS = ("recipes", "rows", "templates", "models", "adapters", "runs", "caches", "kills", "signals", "disks")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.torture", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=float, default=1.0, help="times the usual number of cases; 0.1 is a tenth")
    parser.add_argument("--cases", type=int, help="this number of cases in each part")
    parser.add_argument("--number", type=int, action="append", help="only the case of this number; with --only")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at once")
    parser.add_argument("--keep", type=Path, default=Path("build/torture"), help="where inputs that broke are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args()
    if options.number and len(options.only or ()) != 1:
        parser.error("--number wants one --only")
    return options


def main() -> int:
    options = _options()
    if SHIM not in os.environ:
        _start_again()
    options.keep = options.keep.absolute()
    options.keep.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        os.environ["LORAKIT_CACHE"] = str(folder / "cache")
        for part_name in options.only or PARTS:
            results.append(_run(part_name, options, folder))
            if options.json:
                options.json.write_text(json.dumps([_facts(result) for result in results], indent=2), encoding="utf-8")
        os.chdir("/")
    _print(results, options.seed)
    return int(any(result.broken for result in results))


def _start_again() -> None:
    """Start this program anew with the shim loaded and one thread: nothing of a thread survives a fork."""
    shim = compile_shim(Path(tempfile.mkdtemp(prefix="torture-shim-")))
    one = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    environment = {**os.environ, **one, SHIM: str(shim), "LD_PRELOAD": str(shim)}
    try:
        os.execve(sys.executable, [sys.executable, "-m", "tools.torture", *sys.argv[1:]], environment)
    finally:
        shutil.rmtree(shim.parent, ignore_errors=True)


def _run(name: str, options: argparse.Namespace, folder: Path) -> Result:
    part: Part = importlib.import_module(f"tools.torture.{name}").PART
    count = options.cases or max(1, round(part.count * options.count))
    numbers = options.number or list(range(1, count + 1))
    place = folder / name
    place.mkdir()
    shared = part.prepare(place / "shared")
    told = time.monotonic()

    def tell(result: Result) -> None:
        nonlocal told
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"{name}: {result.tried:,} of {len(numbers):,}, {len(result.broken)} broken", file=sys.stderr)

    result = run_part(part, shared, options.seed, numbers, place, options.keep, options.jobs, tell)
    shutil.rmtree(place, ignore_errors=True)
    for broken in result.broken:
        last = broken["why"].strip().splitlines()[-1][:300]
        print(f"{name} {broken['number']}: {last}\n    {broken['again']}\n    {broken['kept']}", file=sys.stderr)
    return result


def _facts(result: Result) -> dict[str, object]:
    return {
        "part": result.name,
        "tried": result.tried,
        "held": result.held,
        "ended": dict(result.ways),
        "seconds": round(result.seconds, 1),
        "broken": result.broken,
    }


def _print(results: list[Result], seed: int) -> None:
    print(f"{'part':<10} {'tried':>7} {'held':>7} {'broken':>7} {'seconds':>8}  how they ended (seed {seed})")
    for result in results:
        ways = ", ".join(f"{count:,} {way}" for way, count in result.ways.most_common())
        row = f"{result.name:<10} {result.tried:>7,} {result.held:>7,} {len(result.broken):>7,} {result.seconds:>8.0f}"
        print(f"{row}  {ways}")


if __name__ == "__main__":
    sys.exit(main())
