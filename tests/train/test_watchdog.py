"""Hung steps on three gloo processes: who is named, and what every rank's file shows."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pangu.config import load
from pangu.device.environment import npu_environment
from pangu.parallel.layout import Layout
from pangu.train import watchdog
from pangu.train.watchdog import Beat, Watchdog, slowest, spread

WORLD_SIZE = 3
BOUND = 2.0
LAYOUT = Layout(
    pp=1,
    dp_replicate=1,
    dp_shard=WORLD_SIZE,
    cp=1,
    tp=1,
    stage_layers=(1,),
    v_shaped=False,
    devices_per_node=8,
)


def beat(number: int, **changes: object) -> Beat:
    values = {"step": 5, "inside": True, "hung": True, "where": "a.py:1 in f", "waiting": "", "waiting_seconds": 0.0}
    return Beat(number=number, **{**values, **changes})  # type: ignore[arg-type]


IN_X = beat(2, waiting="x")


@pytest.mark.parametrize(
    ("after", "rank", "why"),
    [
        ([beat(2, waiting="x"), beat(2), beat(2, waiting="x")], 1, "waits for nobody"),
        ([beat(2), beat(2, step=4, inside=False, hung=False), beat(2)], 1, "in step 4 (after it)"),
        ([beat(2), beat(2), beat(1)], 2, "says nothing any more"),
        ([beat(2), None, beat(1)], 1, "nothing since training began"),
        ([beat(2, waiting="x", waiting_seconds=5.0), beat(2, waiting="y", waiting_seconds=9.0), IN_X], 1, "in y"),
    ],
    ids=["busy", "earlier step", "silent", "never seen", "all wait"],
)  # fmt: skip
def test_who_is_to_blame(after: list[Beat | None], rank: int, why: str) -> None:
    blamed, text = slowest([beat(1), beat(1) if after[1] else None, beat(1)], after)
    assert blamed == rank
    assert why in text


def spread_of_busy_time(rank: int, folder: Path) -> None:
    with Watchdog(folder, 0.0, LAYOUT, rank) as dog:
        dist.barrier()
        with dog.step(0):
            if rank == 2:
                time.sleep(3.0)
            dist.all_reduce(torch.ones(1))
    result = spread(dog.busy_seconds)
    assert result["slowest_rank"] == 2
    assert result["busy_spread"] > 1.5
    assert rank == 2 or dog.busy_seconds < result["busy_spread"] * result["busy_seconds"]


def sleeping_rank(rank: int, folder: Path) -> None:
    with Watchdog(folder, BOUND, LAYOUT, rank) as dog, dog.step(1):
        if rank == 1:
            wait_for_verdict(folder)
        dist.all_reduce(torch.ones(3, 5))


def waiting_for_a_message(rank: int, folder: Path) -> None:
    """gloo records no messages: the line that is executed tells that rank 0 waits for one."""
    with Watchdog(folder, BOUND, LAYOUT, rank) as dog, dog.step(7):
        if rank == 1:
            wait_for_verdict(folder)
            dist.send(torch.ones(1), 0)
        elif rank == 0:
            dist.recv(torch.ones(1), 1)
        dist.barrier()


def stopped_rank(rank: int, folder: Path) -> None:
    with Watchdog(folder, BOUND, LAYOUT, rank) as dog, dog.step(3):
        if rank == 2:
            time.sleep(1.0)  # so that the others have seen it alive
            print(f"stopped {os.getpid()}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))


def wait_for_verdict(folder: Path) -> None:
    while not (folder / "verdict").exists():
        time.sleep(0.05)


def run(function: Callable[[int, Path], None], folder: Path) -> str:
    """What the three processes that call `function` say, until all have ended well.

    Their fault ends when they have named it: whatever is slow here cannot be taken for it.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(WORLD_SIZE)}
    reading, writing = os.pipe()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, function.__name__, str(folder)],
            env={**environment, "RANK": str(rank)},
            stderr=writing,
        )
        for rank in range(WORLD_SIZE)
    ]
    os.close(writing)
    said, stopped = "", None
    with os.fdopen(reading) as stream:
        for line in stream:
            said += line
            if line.startswith("stopped"):
                stopped = int(line.split()[1])
            elif "Slowest" in line:
                (folder / "verdict").touch()
                if stopped:
                    os.kill(stopped, signal.SIGCONT)
    assert [process.wait(timeout=60) for process in processes] == [0] * WORLD_SIZE, said
    return said


def test_a_sleeping_rank_is_named_and_every_rank_leaves_its_stacks(tmp_path: Path) -> None:
    said = run(sleeping_rank, tmp_path)
    assert said.count("has taken more than") == 1
    assert "Slowest: rank 1 (pp 0, dp_replicate 0, dp_shard 1, cp 0, tp 0), which waits for nobody" in said
    assert re.search(r"in wait_for_verdict; 2 of the others wait in gloo:all_reduce of default_pg", said)
    files = {path.name: path.read_text() for path in (tmp_path / "step_1").iterdir()}
    assert files.keys() == {"rank_0.txt", "rank_1.txt", "rank_2.txt"}
    assert "time.sleep(0.05)" in files["rank_1.txt"]
    assert "No collective is in flight." in files["rank_1.txt"]
    for rank in (0, 2):
        text = files[f"rank_{rank}.txt"]
        assert re.search(r"Collectives in flight:\n  gloo:all_reduce of default_pg, .* of \[\[3, 5\]\]", text)
        assert "dist.all_reduce(torch.ones(3, 5))" in text
        assert "Thread watchdog:" in text


def test_a_rank_that_waits_for_a_message_is_not_blamed(tmp_path: Path) -> None:
    assert "Slowest: rank 1 (" in run(waiting_for_a_message, tmp_path)
    assert "dist.recv(torch.ones(1), 1)" in (tmp_path / "step_7" / "rank_0.txt").read_text()


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    said = run(stopped_rank, tmp_path)
    assert "Slowest: rank 2 (pp 0, dp_replicate 0, dp_shard 2, cp 0, tp 0), which says nothing any more" in said


def test_the_spread_of_busy_time_names_the_slowest(tmp_path: Path) -> None:
    run(spread_of_busy_time, tmp_path)
    assert not list(tmp_path.iterdir()), "no bound was set"


def test_hccl_is_to_remember_collectives_when_a_step_has_a_bound() -> None:
    bounded = load("debug", ["--train.hang_seconds", "60", "--train.device", "npu"])
    names = [setting.name for setting in npu_environment(bounded, {}).settings]
    assert "TORCH_HCCL_TRACE_BUFFER_SIZE" in names


def test_one_process_dumps_its_stacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    alone = Layout(**{**vars(LAYOUT), "dp_shard": 1})
    with Watchdog(tmp_path, 0.2, alone, 0) as dog, dog.step(4):
        while not (tmp_path / "step_4" / "rank_0.txt").exists():
            time.sleep(0.05)
    assert "step 4 has taken more than 0.2 s" in capfd.readouterr().err
    assert "test_one_process_dumps_its_stacks" in (tmp_path / "step_4" / "rank_0.txt").read_text()


if __name__ == "__main__":
    watchdog.SILENT_SECONDS, watchdog.BEAT_SECONDS = 4.0, 0.5
    dist.init_process_group("gloo")
    dist.barrier()
    globals()[sys.argv[1]](dist.get_rank(), Path(sys.argv[2]))
    dist.destroy_process_group()
