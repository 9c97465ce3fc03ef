"""Whether processes of this machine can compute together: a sum over all GPUs, or over two processes of the processor.

Run as a module it is one of those processes.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lorakit.amounts import counted, decimal_bytes, gibibytes
from lorakit.doctor.check import DoctorFinding, broken, note, ok, require_import
from lorakit.hardware.devices import visible_gpus
from lorakit.hardware.topology import describe_path, read_topology

_SECONDS = 60  # for all processes: importing torch takes most of the few that they need
_NUMBERS, _TIMES = 1 << 20, 5
_LITTLE_SHARED = 1 << 29
_SHARED_MEMORY = Path("/dev/shm")
# What the errors of gloo, NCCL and torch say -> what to do.
_REMEDIES = (
    (
        r"resolve|gethostbyname|getaddrinfo|Name or service not known",
        "write this machine's name with its address into /etc/hosts, or export GLOO_SOCKET_IFNAME=lo",
    ),
    (
        r"/dev/shm|shm_open|shared memory|No space left|Bus error",
        "give /dev/shm more room: docker run --ipc=host, or --shm-size=8g",
    ),
    (
        r"refused|[Tt]imed out|Timeout|No route|unreachable",
        "let processes of this machine reach each other: a firewall or the network of a container keeps them apart",
    ),
    (
        r"NCCL|nccl|peer",
        "NCCL_DEBUG=INFO lorakit doctor says more; where cards cannot reach each other, NCCL_P2P_DISABLE=1 helps",
    ),
)


def check_links() -> Iterator[DoctorFinding]:
    """What joins the GPUs of this machine."""
    pairs = defaultdict(list)
    for (one, other), word in read_topology().items():
        pairs[word].append(f"{one}-{other}")
    if pairs:
        parts = (f"{' '.join(names)} by {describe_path(word)} ({word})" for word, names in pairs.items())
        yield ok("links", "; ".join(parts), pairs=dict(pairs))


def check_collective() -> Iterator[DoctorFinding]:
    """A sum over all GPUs by NCCL, or over two processes of the processor by gloo, and what may be in its way."""
    require_import("torch")
    import torch

    count = torch.cuda.device_count()
    device, count = ("cuda", count) if count > 1 else ("cpu", 2)
    what = f"a sum over {counted(count, 'GPU')}" if device == "cuda" else "a sum over two processes of the processor"
    seconds, error = _sum_over(count, device)
    if error:
        yield broken("collective", f"{what} fails: {error}", _remedy(error))
    else:
        size = decimal_bytes(4 * _NUMBERS)
        yield ok("collective", f"{what}: {size} in {1000 * seconds:.1f} ms", processes=count, seconds=seconds)
    yield from _check_name()
    if len(visible_gpus()) > 1 and (free := shutil.disk_usage(_SHARED_MEMORY).free) < _LITTLE_SHARED:
        message = f"{gibibytes(free)} free, through which NCCL passes data between cards that cannot reach each other"
        yield note("/dev/shm", message, "docker run --ipc=host, or --shm-size=8g", free=free)


def _check_name() -> Iterator[DoctorFinding]:
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        message = f"the name of this machine, {name}, does not resolve ({error}): others cannot reach it by its name"
        yield note("name", message, "several machines need it in /etc/hosts or in the DNS")


def _remedy(error: str) -> str:
    return next(
        (remedy for pattern, remedy in _REMEDIES if re.search(pattern, error)),
        "TORCH_DISTRIBUTED_DEBUG=DETAIL lorakit doctor says more",
    )


def _sum_over(count: int, device: str) -> tuple[float, str]:
    """The seconds of one sum, and why it failed; empty where it did not."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(count)]
        processes = [
            _start(device, output, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank, output in enumerate(outputs)
        ]
        try:
            failed = _first_failure(processes)
        except TimeoutError as error:
            return 0.0, str(error)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            lines = [line for line in outputs[failed].read_text(errors="replace").splitlines() if line.strip()]
            return 0.0, lines[-1] if lines else f"a process ended with exit code {processes[failed].returncode}"
        results = [json.loads(output.read_text().splitlines()[-1]) for output in outputs]
    expected = sum(range(count))
    wrong = next((f"the sum is {one['sum']}, not {expected}" for one in results if one["sum"] != expected), "")
    return max(one["seconds"] for one in results), wrong


def _start(device: str, output: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "lorakit.doctor.collective", device]
    with output.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _first_failure(processes: "list[subprocess.Popen[bytes]]") -> int | None:
    """The rank of the first process that ends with an error, for which the others wait; None where all end well."""
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        codes = [process.poll() for process in processes]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(0.05)
    raise TimeoutError(f"timed out: no answer within {_SECONDS} s")


def _take_part(device: str) -> None:
    """Add up the ranks of all processes, several times over, and print what came out and how long one took."""
    import torch

    from lorakit.distributed.join import joined
    from lorakit.distributed.processes import rank, sum_in_place

    with joined(device=device):
        for _ in range(_TIMES):
            tensor = torch.full((_NUMBERS,), float(rank()), device=device)
            start = time.perf_counter()
            sum_in_place([tensor])
            total = float(tensor[-1])  # waits for the GPU
            seconds = time.perf_counter() - start
    sys.stdout.write(json.dumps({"sum": total, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    _take_part(sys.argv[1])
