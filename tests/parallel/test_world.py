"""The helper of these tests: what fails on one rank must fail here, with its name, and not spoil what comes after."""

import os
import signal
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from world import World


def sum_of_ranks(factor: int) -> int:
    total = torch.tensor(dist.get_rank() * factor)
    dist.all_reduce(total)
    return int(total)


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("on purpose")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_results_come_in_the_order_of_ranks(worlds: Callable[[int], World]) -> None:
    assert worlds(2).run(sum_of_ranks, 3) == [3, 3]
    assert worlds(2).run(dist.get_rank) == [0, 1]


@pytest.mark.parametrize(
    ("function", "message"),
    [(fail_on_rank_1, "(?s)rank 0:.*rank 1:.*ValueError: on purpose"), (die_on_rank_1, "rank 1:\n.*exit code -9")],
)
def test_failures_name_the_rank_and_end_at_once(
    function: Callable[[], None], message: str, worlds: Callable[[int], World]
) -> None:
    with pytest.raises(AssertionError, match=message):
        worlds(2).run(function)
    assert worlds(2).run(sum_of_ranks, 1) == [1, 1]
