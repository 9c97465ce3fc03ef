"""The watch: a process that waits inside an operation ends where another one has failed, hangs or is out of reach."""

import threading
from pathlib import Path

from rank_processes import outcomes_on

from lorakit.distributed import processes, watch
from lorakit.errors import UserError


def _wait() -> None:
    """As inside a collective operation whose message never comes."""
    assert threading.Event().wait(120), "nothing ended it"


def _fails_inside_an_operation() -> None:
    watch._TICK = 0.1

    def work() -> None:
        if processes.rank() == 1:
            raise UserError("the second cannot")
        _wait()

    processes.together(lambda: processes.announced(work))


def test_a_failure_inside_an_operation_ends_those_who_wait_with_its_exit_code():
    first, second = outcomes_on(2, _fails_inside_an_operation)
    assert second[0] == "UserError" and first == ("EOFError", "process 0 ended with exit code 2")


class _Unreachable:
    def set(self, key: str, value: str) -> None:
        raise RuntimeError("the link is cut")


def _loses_the_link(folder: Path) -> None:
    watch._TICK = 0.1
    own = processes._world.watch
    own.report = (folder / f"{processes.rank()}.txt").write_text
    if processes.rank() == 1:
        own.store = _Unreachable()
    _wait()


def test_who_is_silent_and_who_cannot_reach_the_others_end_with_a_message(tmp_path):
    first, second = outcomes_on(2, _loses_the_link, tmp_path)
    assert (first[1], second[1]) == tuple(f"process {rank} ended with exit code 1" for rank in (0, 1))
    assert "rank 1 on " in (tmp_path / "0.txt").read_text()
    assert "has not answered" in (tmp_path / "1.txt").read_text()


def _is_silent_until_it_leaves() -> str:
    watch._TICK = 0.01  # a process that has left is not missed
    if processes.rank() == 1:
        return "left"
    threading.Event().wait(1)
    return "went on"


def test_a_process_that_has_done_its_part_is_waited_for():
    assert [value for _, value in outcomes_on(2, _is_silent_until_it_leaves)] == ["went on", "left"]
