"""Pictures of a pipeline hold every pass at its time."""

import json
from pathlib import Path

import pytest

from pangu.plan.simulate import Durations, Timeline, schedule_order, simulate
from pangu.plan.timeline import chrome_trace, write_timeline


def timeline_of(schedule: str, per_rank: int) -> Timeline:
    order = schedule_order(schedule, 4, per_rank, 8)
    count = order.num_stages
    uneven = [0.1 + 0.01 * (s % 3) for s in range(count)]
    sharded = Durations(uneven, uneven, uneven, [0.01] * count, gather=[0.05] * count, reduce=[0.2] * count)
    return simulate(order, sharded)


@pytest.mark.parametrize(("schedule", "per_rank"), [("1f1b", 1), ("interleaved_1f1b", 3), ("dualpipe_v", 2)])
def test_trace_is_the_timeline(schedule: str, per_rank: int) -> None:
    timeline = timeline_of(schedule, per_rank)
    events = chrome_trace(timeline, "title")["traceEvents"]
    passes = [event for event in events if event["ph"] == "X" and event["tid"] == 0]
    assert len(passes) == len(timeline.order.steps)
    assert sum(event["dur"] for event in passes) == pytest.approx(sum(timeline.compute_seconds) * 1e6)
    assert max(event["ts"] + event["dur"] for event in events if event["ph"] == "X") == pytest.approx(
        timeline.seconds * 1e6
    )
    forward = [event for event in passes if event["cat"] == "forward"]
    micro_batches = [(event["args"]["stage"], event["args"]["micro_batch"]) for event in forward]
    assert sorted(micro_batches) == [(s, m) for s in range(4 * per_rank) for m in range(8)]
    collectives = [event for event in events if event["ph"] == "X" and event["tid"] == 1]
    assert len(collectives) == 2 * 4 * per_rank
    for rank in range(4):  # what a counter shows last is nothing in flight
        counters = [event for event in events if event["ph"] == "C" and event["pid"] == rank]
        assert not any(counters[-1]["args"].values())


def test_files(tmp_path: Path) -> None:
    picture, trace = write_timeline(timeline_of("zero_bubble_v", 2), tmp_path / "new", "a title", "name")
    assert picture.name == "name.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(trace.read_text())["otherData"] == {"title": "a title"}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["name.json", "name.png"]
