"""The event file is valid JSON line by line, survives kills, and after a resume reads as if nothing had happened."""

import itertools
import json
import math
import multiprocessing
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from pangu.errors import PanguError, TrainingError
from pangu.train.events import FILE_NAME, EventLog, read_events, tensorboard


def write_steps(run: Path, first: int, last: int) -> None:
    """A trainer's events for the steps after `first` up to `last`."""
    log = EventLog(run, first)
    for step in range(first + 1, last + 1):
        log.write("step", step, tokens=100 * step, loss=1 / step)
        if step % 2 == 0:
            log.write("validation", step, losses={"code": 2 / step})
    log.close()


def test_events_are_read_back(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 2)
    assert read_events(tmp_path) == [
        {"kind": "step", "step": 1, "tokens": 100, "loss": 1.0},
        {"kind": "step", "step": 2, "tokens": 200, "loss": 0.5},
        {"kind": "validation", "step": 2, "losses": {"code": 1.0}},
    ]


@pytest.mark.parametrize("resumed_at", range(7))
def test_resumed_file_equals_the_uninterrupted_one(tmp_path: Path, resumed_at: int) -> None:
    write_steps(tmp_path / "uninterrupted", 0, 8)
    write_steps(tmp_path / "resumed", 0, 6)
    write_steps(tmp_path / "resumed", resumed_at, 8)
    expected = (tmp_path / "uninterrupted" / FILE_NAME).read_bytes()
    assert (tmp_path / "resumed" / FILE_NAME).read_bytes() == expected


@pytest.mark.parametrize("tail", [b'{"kind": "step", "st', b'{"kind": "step", "step": 5}', b"\0\0\0\n"])
def test_line_cut_short_is_ignored_and_removed(tmp_path: Path, tail: bytes) -> None:
    write_steps(tmp_path, 0, 4)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert read_events(tmp_path)[-1]["step"] == 4
    EventLog(tmp_path, 9).close()
    assert path.read_bytes() == whole


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("step", 1, loss=math.nan, nested={"list": [math.inf, (1.5, -math.inf)]})
    log.close()
    line = (tmp_path / FILE_NAME).read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read_events(tmp_path)[0] == {
        "kind": "step",
        "step": 1,
        "loss": None,
        "nested": {"list": [None, [1.5, None]]},
    }


def test_damaged_line_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 4)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step: 2'))
    with pytest.raises(PanguError, match=r"events\.jsonl: line 2 is not an event"):
        read_events(tmp_path)


def test_full_disk_is_reported(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(TrainingError, match=r"events\.jsonl: File too large; mend that and --resume"):
            log.write("message", 1, text="x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.close()
    assert read_events(tmp_path) == []


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(PanguError, match="is not a run"):
        read_events(tmp_path / "nowhere")


def test_subscribers_and_tensorboard_see_every_event(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen: list[dict[str, Any]] = []
    log = EventLog(tmp_path, 0, [seen.append, tensorboard(tmp_path / "tensorboard")])
    log.write("step", 1, tokens=7, loss=math.nan, phase="general")
    log.write("step", 2, tokens=14, loss=0.25)
    log.write("statistics", 2, gains={"attention_norm": {"mean": [1.0, 0.5]}})
    log.close()
    assert seen == read_events(tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    scalars = {name: [(point.step, point.value) for point in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert scalars == {
        "step/tokens": [(1, 7.0), (2, 14.0)],
        "step/loss": [(2, 0.25)],
        "statistics/gains/attention_norm/mean/0": [(2, 1.0)],
        "statistics/gains/attention_norm/mean/1": [(2, 0.5)],
    }


def write_without_end(run: Path, first: int, ready: Any) -> None:
    """Runs in a process that is killed."""
    log = EventLog(run, first)
    for step in itertools.count(first + 1):
        log.write("step", step, text=str(step) * 5000)
        if step > first + 10:
            ready.set()


def test_kill_at_any_moment_leaves_whole_events(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    choice = random.Random(0)
    resumed_at = 0
    for _ in range(10):
        ready = context.Event()
        process = context.Process(target=write_without_end, args=(tmp_path, resumed_at, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(choice.uniform(0, 0.02))
        process.kill()
        process.join()
        steps = [event["step"] for event in read_events(tmp_path)]
        assert steps == list(range(1, len(steps) + 1))
        resumed_at = choice.randrange(resumed_at, len(steps))
