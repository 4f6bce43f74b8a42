"""A checkpoint of any layout goes on in any other, on one device too, as if nothing had changed."""

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import cases
import pytest
import torch.distributed as dist
from equality import load
from world import World

from pangu.convert import export
from pangu.train.events import read_events
from pangu.train.run import load_model
from pangu.train.trainer import train

CHAIN = (
    ("tp4 without sp", cases.FOUR["tp4 without sp"]),
    ("pp2 x dp2, zero 3", cases.FOUR["pp2 x dp2, zero 3"]),
    ("one device", ()),
    ("cp2 x tp2", cases.dims(cp=2, tp=2)),
    ("pp2 zero bubble v", cases.FOUR["pp2 zero bubble v"]),
    ("hybrid", cases.FOUR["hybrid"]),
)


def train_until(step: int, run: Path, overrides: tuple[str, ...]) -> bool:
    """Go on with `run` up to `step`, as the rank of the default process group that this process is."""
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
    else:
        rank, size = "0", "1"
    options = ("--train.steps", str(step), "--metrics.tensorboard", "false", "--checkpoint.interval", "0")
    with mock.patch.dict(os.environ, RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank):
        return train(load(*options, *overrides), run, resume=True)


@pytest.mark.parametrize("model", [(), cases.TIED], ids=["untied", "tied"])
def test_a_run_through_many_layouts_equals_one_device(
    model: tuple[str, ...], tmp_path: Path, worlds: Callable[[int], World]
) -> None:
    steps = 2 * len(CHAIN)
    assert train_until(steps, tmp_path / "one", model)
    for index, (name, layout) in enumerate(CHAIN):
        arguments = 2 * (index + 1), tmp_path / "many", model + layout
        reached = [train_until(*arguments)] if name == "one device" else worlds(4).run(train_until, *arguments)
        assert all(reached), name
    ours, theirs = (
        [event for event in read_events(tmp_path / run) if event["kind"] == "step"] for run in ("many", "one")
    )
    assert [event["step"] for event in ours] == list(range(1, steps + 1))
    for here, there in zip(ours, theirs, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
    mine, expected = (dict(load_model(tmp_path / run).named_parameters()) for run in ("many", "one"))
    assert mine.keys() == expected.keys()
    for name, weight in mine.items():
        assert (weight - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
    model_of_run = load_model(tmp_path / "many")
    assert export(dict(model_of_run.named_parameters()), model_of_run.config, tmp_path / "exported") == "glm4"
