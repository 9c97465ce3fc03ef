"""Several processes on this machine's processor, joined as a launcher would join them, for tests."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

_SECONDS = 240  # far more than any of them takes; none may wait for ever
_context = multiprocessing.get_context("forkserver")
# The server imports them once; a process that is forked from it has them already.
_context.set_forkserver_preload(["lorakit.train.run", "lorakit.merge.run", "lorakit.evaluate.run"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_on(count: int, function: Callable[..., Any], *arguments: Any, **environment: str) -> list[Any]:
    """What a function of a module returns on each of `count` joined processes, by rank; its error, raised here, where
    one fails. What it is given and what it returns can be pickled."""
    results = outcomes_on(count, function, *arguments, **environment)
    for rank, (error, text) in enumerate(results):
        if error:
            raise AssertionError(f"process {rank} of {count} failed:\n{text}")
    return [value for _, value in results]


def outcomes_on(count: int, function: Callable[..., Any], *arguments: Any, **environment: str) -> list[tuple[str, Any]]:
    """Of each process the class of its error with the traceback, or "" with what it returned."""
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **environment}
    pipes, processes = [], []
    for rank in range(count):
        here, there = _context.Pipe(duplex=False)
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context.Process(target=_run, args=(there, own, function, arguments), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    results = []
    for rank, pipe in enumerate(pipes):
        try:
            results.append(pipe.recv() if pipe.poll(_SECONDS) else ("TimeoutError", f"process {rank} hangs"))
        except EOFError:
            processes[rank].join(5)
            results.append(("EOFError", f"process {rank} ended with exit code {processes[rank].exitcode}"))
    for process in processes:
        process.join(5)
        process.kill()
    return results


def _run(pipe: Any, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    import torch

    from lorakit.distributed.join import joined

    torch.set_num_threads(1)
    try:
        with joined():
            value = function(*arguments)
        pipe.send(("", value))
    except BaseException as error:
        pipe.send((type(error).__name__, f"{traceback.format_exc()}"))
