"""How fast llama.cpp runs a GGUF file, and how much memory it takes: measured in a process for each file.

`python -m lorakit.evaluate.gguf_speed` is that process. It imports nothing but llama.cpp's server, so that what it
takes is the model's.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, UserError
from lorakit.progress import Progress

GENERATED = 48
"""Tokens generated after the prompt."""
REPEATS = 3
ROUNDS = 2
"""Each file is measured REPEATS times in each of ROUNDS processes, one file after the other; the least time counts,
since other programs can only add to it."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second read and written, one request at a time; and the most memory in bytes above that of the process
    without a model."""

    tokens_in: float
    tokens_out: float
    memory: int


def measure_speeds(
    files: Mapping[str, tuple[Path, Path | None]], prompt: Sequence[int], threads: int, progress: Progress
) -> dict[str, Speed]:
    """The speed of each file, alone or with the GGUF LoRA beside it applied."""
    rounds: dict[str, list[Speed]] = {name: [] for name in files}
    with progress.bar("tokens a second", total=ROUNDS * len(files)) as bar:
        for _ in range(ROUNDS):
            for name, (file, adapter) in files.items():
                rounds[name].append(measure_speed(file, prompt, threads, adapter))
                bar.advance()
    return {
        name: Speed(
            max(one.tokens_in for one in of_file),
            max(one.tokens_out for one in of_file),
            max(one.memory for one in of_file),
        )
        for name, of_file in rounds.items()
    }


def measure_speed(file: Path, prompt: Sequence[int], threads: int, adapter: Path | None = None) -> Speed:
    """Run a prompt through llama.cpp's server and generate after it; `adapter`: a GGUF LoRA applied on the file."""
    facts = {"file": str(file), "adapter": str(adapter) if adapter else None, "prompt": list(prompt)}
    command = [sys.executable, "-m", __name__, json.dumps({**facts, "threads": threads})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        if "No module named 'xllamacpp'" in done.stderr:
            raise UserError("--ladder measures with llama.cpp's server: pip install 'lorakit[export]'.")
        reasons = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise LorakitError(
            f"{file}: llama.cpp's server ended with code {done.returncode}: {reasons[-1] if reasons else 'no reason'}."
        )
    return Speed(**json.loads(lines[-1]))


def _measure(facts: dict[str, Any]) -> Speed:
    import xllamacpp

    before = _peak()
    settings = xllamacpp.CommonParams()
    settings.model.path = facts["file"]
    settings.hostnames, settings.port = ["127.0.0.1"], 0  # it listens, on a port that is free, though nobody is told
    settings.n_ctx, settings.n_parallel, settings.verbosity = len(facts["prompt"]) + GENERATED + 8, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = facts["threads"]
    if facts["adapter"]:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(facts["adapter"], 1.0)]
    server = xllamacpp.Server(settings)
    request = {"prompt": facts["prompt"], "n_predict": GENERATED, "ignore_eos": True, "cache_prompt": False}
    # Only the likeliest token is looked at: other samplers take time that is not the model's.
    request |= {"temperature": 0, "samplers": ["top_k"], "top_k": 1}
    timings = [server.handle_completions(dict(request))["timings"] for _ in range(REPEATS)]
    short = min(one["predicted_n"] for one in timings) < GENERATED or timings[0]["prompt_n"] < len(facts["prompt"])
    if short:
        raise RuntimeError(f"the server read {timings[0]['prompt_n']} and wrote {timings[0]['predicted_n']} tokens")
    tokens_in = max(one["prompt_per_second"] for one in timings)
    tokens_out = max(one["predicted_per_second"] for one in timings)
    return Speed(tokens_in, tokens_out, _peak() - before)


def _peak() -> int:
    """The most resident memory of this process so far. Linux tells it for the program that runs; getrusage there also
    counts what the process was before it."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_measure(json.loads(sys.argv[1])))) + "\n")
