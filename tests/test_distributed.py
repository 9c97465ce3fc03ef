"""What several processes do together: all get the same, and what one meets all meet."""

import torch
from rank_processes import outcomes_on, run_on

from lorakit.distributed import processes
from lorakit.errors import UserError


def _sums() -> list[float]:
    own = processes.rank() + 1.0
    tensors = [torch.full((3, 2), own), torch.full((5,), own).double(), torch.full((1 << 24,), own), torch.ones(2)]
    sent = processes.sum_in_place(tensors)
    return [float(tensor.double().mean()) for tensor in tensors] + [sent / 4]


def test_tensors_are_added_up_over_all_processes():
    assert run_on(3, _sums) == [[6.0, 6.0, 6.0, 3.0, 6 + 10 + (1 << 24) + 2]] * 3


def _facts() -> tuple:
    rank = processes.rank()
    copied = torch.full((2, 2), float(rank)).t()
    processes.copy_from_first([copied])
    return (
        processes.gather(rank),
        processes.from_first(f"by {rank}"),
        processes.any_of(rank == 1, rank == 2),
        float(copied.sum()),
    )


def test_facts_are_gathered_and_shared():
    assert run_on(2, _facts) == [([0, 1], "by 0", (True, False), 0.0)] * 2


def _fails_on_the_second() -> None:
    def work() -> None:
        if processes.rank() == 1:
            raise UserError("the second has no room")

    processes.together(work)


def test_a_failure_of_one_is_a_failure_of_all_and_is_told_once():
    first, second, third = outcomes_on(3, _fails_on_the_second)
    assert (first[0], second[0], third[0]) == ("FailedElsewhere", "UserError", "FailedElsewhere")


def _dies(how: int) -> None:
    import os

    if processes.rank() == 1:
        os.kill(os.getpid(), how)
    processes.gather(1)


def test_a_killed_process_is_noticed():
    first, second = outcomes_on(2, _dies, 9)
    assert first[0] == "ProcessLost" and second[0] == "EOFError"
