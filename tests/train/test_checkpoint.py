"""Checkpoints survive kills, damage, full disks and foreign models, and give back every bit."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pangu.config import CheckpointConfig
from pangu.errors import CheckpointError
from pangu.train.checkpoint import Checkpointer, checkpoint_path, complete_steps, load_checkpoint, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def make_state(step: int) -> dict[str, Any]:
    """A state that is a function of `step`, with the kinds of leaves that training has."""
    generator = torch.Generator().manual_seed(step)
    weights = {name: torch.randn(64, 32, generator=generator) for name in ("layers.0.weight", "layers.1.weight")}
    return {
        "model": weights,
        "optimizer": {"exp_avg": {name: (weight**2).bfloat16() for name, weight in weights.items()}},
        "rng": {"cpu": generator.get_state(), "python": random.Random(step).getstate()},
        "counters": {"step": step, "losses": [float(step), 0.5]},
    }


def save(folder: Path, *steps: int, **config: Any) -> None:
    with Checkpointer(folder, CheckpointConfig(**{"asynchronous": False, "keep_last": 10, **config})) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"config": {"steps": 7}})


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("asynchronous", [False, True])
def test_load_gives_back_every_bit_in_place(folder: Path, asynchronous: bool) -> None:
    save(folder, 100, asynchronous=asynchronous)
    state = make_state(0)
    weight = state["model"]["layers.0.weight"].requires_grad_()
    metadata = load_checkpoint(folder, state)
    assert state["model"]["layers.0.weight"] is weight
    assert_same(state, make_state(100))
    assert metadata["step"] == 100
    assert metadata["config"] == {"steps": 7}


def test_part_of_the_state_can_be_loaded(folder: Path) -> None:
    save(folder, 3)
    state = {"model": make_state(0)["model"]}
    load_checkpoint(folder, state)
    assert_same(state["model"], make_state(3)["model"])


def test_asynchronous_save_keeps_the_state_of_its_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Checkpointer._write

    def write_late(*arguments: Any) -> None:
        time.sleep(0.2)
        write(*arguments)

    monkeypatch.setattr(Checkpointer, "_write", write_late)
    with Checkpointer(folder, CheckpointConfig(asynchronous=True)) as checkpointer:
        for step in (1, 2):  # the second save reuses the staging buffers of the first
            state = make_state(step)
            checkpointer.save(step, state, {})
            assert step not in complete_steps(folder)
            for weight in state["model"].values():
                weight.fill_(-1)
            state["counters"]["losses"].append(9.0)
    for step in (1, 2):
        state = make_state(0)
        load_checkpoint(folder, state, step)
        assert_same(state, make_state(step))


def test_only_one_save_is_in_flight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    write = Checkpointer._write

    def write_alone(self: Checkpointer, step: int, *arguments: Any) -> None:
        assert not running
        running.append(step)
        time.sleep(0.05)
        write(self, step, *arguments)
        running.clear()

    monkeypatch.setattr(Checkpointer, "_write", write_alone)
    with Checkpointer(folder, CheckpointConfig(asynchronous=True, keep_last=5)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step), {})
        assert checkpointer.latest() == 3
    assert complete_steps(folder) == [1, 2, 3]


def test_keeps_the_newest_and_the_milestones(folder: Path) -> None:
    save(folder, *range(10, 80, 10), keep_last=2, milestone_interval=30)
    assert complete_steps(folder) == [30, 50, 60, 70]
    assert not list(folder.glob(".*"))


def test_same_step_again_replaces_the_checkpoint(folder: Path) -> None:
    save(folder, 5)
    with Checkpointer(folder, CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(5, make_state(6), {})
    state = make_state(0)
    load_checkpoint(folder, state)
    assert_same(state, make_state(6))


def damage(path: Path, how: str) -> None:
    match how:
        case "missing":
            path.unlink()
        case "truncated":
            os.truncate(path, path.stat().st_size // 2)
        case "altered":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json", "checksums.json"])
def test_damage_is_named_and_the_checkpoint_before_it_used(
    folder: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder, 1, 2)
    damage(checkpoint_path(folder, 2) / name, how)
    state = make_state(0)
    assert load_checkpoint(folder, state)["step"] == 1
    assert_same(state, make_state(1))
    assert "step_00000002 is damaged" in caplog.text
    assert name in caplog.text or name == "checksums.json"


def test_damaged_checkpoint_asked_for_by_step_is_refused(folder: Path) -> None:
    save(folder, 1, 2)
    damage(checkpoint_path(folder, 2) / "__0_0.distcp", "altered")
    state = make_state(0)
    with pytest.raises(CheckpointError, match=r"step_00000002 is damaged: __0_0\.distcp .* another step of 1, 2"):
        load_checkpoint(folder, state, 2)
    assert_same(state, make_state(0))


def test_nothing_intact(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load_checkpoint(folder, {})
    save(folder, 1)
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; complete ones: 1"):
        load_checkpoint(folder, {}, 4)
    damage(checkpoint_path(folder, 1) / "__0_0.distcp", "truncated")
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        load_checkpoint(folder, make_state(0))


def test_damaged_checkpoints_do_not_count_as_kept_ones(folder: Path) -> None:
    save(folder, 1, 2, 3)
    damage(checkpoint_path(folder, 3) / "__0_0.distcp", "truncated")
    with Checkpointer(folder, CheckpointConfig(asynchronous=False, keep_last=2)) as checkpointer:
        state = make_state(0)
        assert checkpointer.load(state)["step"] == 2
        assert checkpointer.latest() == 3
        checkpointer.save(4, state, {})
    assert complete_steps(folder) == [2, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: {**model, "layers.0.weight": torch.zeros(64, 33)},
            r"layers.0.weight is \[64, 32\].* \[64, 33\]",
        ),
        (lambda model: {name: weight.double() for name, weight in model.items()}, "layers.0.weight .*float32.*float64"),
        (lambda model: {**model, "layers.2.weight": torch.zeros(1)}, "layers.2.weight is absent in the checkpoint"),
        (lambda model: {"layers.0.weight": model["layers.0.weight"]}, r"layers.1.weight .* and absent here"),
    ],
)
def test_checkpoint_of_another_model_is_refused(folder: Path, change: Any, message: str) -> None:
    save(folder, 1)
    state = {**make_state(0), "model": change(make_state(0)["model"])}
    before = {name: weight.clone() for name, weight in state["model"].items()}
    with pytest.raises(CheckpointError, match=f"is of another model: model.{message}"):
        load_checkpoint(folder, state)
    assert_same(state["model"], before)
    assert_same(state["counters"], make_state(0)["counters"])


def assert_failed_save_leaves_no_trace(folder: Path, message: str) -> None:
    with Checkpointer(folder, CheckpointConfig(asynchronous=True)) as checkpointer:
        checkpointer.save(2, make_state(2), {})
        with pytest.raises(CheckpointError, match=f"step_00000002 was not written: {message}.*it needs .* MiB.* free"):
            checkpointer.wait()
        checkpointer.wait()  # reported once
    assert [path.name for path in folder.iterdir()] == ["step_00000001"]
    assert verify(checkpoint_path(folder, 1)) is None


def test_too_little_space_is_noticed_before_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("torch.distributed.checkpoint.save", lambda *_, **__: pytest.fail("was written"))
    assert_failed_save_leaves_no_trace(folder, "No space left on device")


def test_write_that_fails_half_way(folder: Path) -> None:
    save(folder, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        assert_failed_save_leaves_no_trace(folder, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpointer, "_check_space", lambda *_: None)  # what it overlooks, the system call reports
    save(small_disk / "checkpoints", 1)
    assert_failed_save_leaves_no_trace(small_disk / "checkpoints", "No space left on device")


def test_background_error_surfaces_at_the_next_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(folder, CheckpointConfig(asynchronous=True)) as checkpointer:
        checkpointer.save(1, {"model": {"weight": lambda: None}}, {})
        with pytest.raises(CheckpointError, match="step_00000001 was not written: Can't pickle"):
            checkpointer.save(2, make_state(2), {})
        checkpointer.save(3, {"model": {"weight": lambda: None}}, {})
        with pytest.raises(CheckpointError, match="step_00000003"):
            check_without_end(checkpointer)


def check_without_end(checkpointer: Checkpointer) -> None:
    while True:
        checkpointer.check()
        time.sleep(0.01)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/checkpoints: Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints", CheckpointConfig())


def save_without_end(folder: Path, ready: Any) -> None:
    """Runs in a process that is killed."""
    torch.set_num_threads(1)
    checkpointer = Checkpointer(folder, CheckpointConfig(asynchronous=True, keep_last=2))
    first = (checkpointer.latest() or 0) + 1
    for step in itertools.count(first):
        checkpointer.save(step, make_state(step), {})
        if step > first:
            ready.set()


def test_kill_at_any_moment_leaves_complete_checkpoints(folder: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pangu.train.checkpoint"])
    delays = random.Random(0)
    interrupted, newest = 0, 0
    for _ in range(12):
        ready = context.Event()
        process = context.Process(target=save_without_end, args=(folder, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(delays.uniform(0, 0.15))
        process.kill()
        process.join()
        interrupted += any(folder.glob(".*"))
        steps = complete_steps(folder)
        assert all(verify(checkpoint_path(folder, step)) is None for step in steps)
        state = make_state(0)
        load_checkpoint(folder, state)
        assert_same(state, make_state(steps[-1]))
        assert steps[-1] > newest
        newest = steps[-1]
    assert interrupted
    Checkpointer(folder, CheckpointConfig()).close()
    assert not list(folder.glob(".*"))


WEIGHTS = {"embedding.weight": (7, 4), "layers.0.weight": (4, 6), "norm.weight": (5,)}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(*shape, generator=generator) for name, shape in WEIGHTS.items()}


def save_on_two_ranks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder.parent}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def sharded(*placements: Any) -> dict[str, DTensor]:
        return {
            name: distribute_tensor(weight, mesh, [placement])
            for (name, weight), placement in zip(weights().items(), placements, strict=True)
        }

    with Checkpointer(folder, CheckpointConfig(asynchronous=True)) as checkpointer:
        state = {"model": sharded(Shard(0), Shard(0), Replicate()), "counters": {"step": 1}}
        checkpointer.save(1, state, {})
        for weight in state["model"].values():
            weight.to_local().fill_(-1)
        checkpointer.wait()

        other_layout = sharded(Replicate(), Shard(1), Shard(0))
        for weight in other_layout.values():
            weight.to_local().zero_()
        checkpointer.load({"model": other_layout, "counters": {"step": 0}})
        assert_same({name: weight.full_tensor() for name, weight in other_layout.items()}, weights())

        stage = {name: weight for name, weight in other_layout.items() if name.startswith("layers") == bool(rank)}
        checkpointer.load({"model": stage, "counters": {"step": 0}})
        with pytest.raises(CheckpointError, match=r"another model: model\.layers\.0\.weight"):
            checkpointer.load({"model": {name: weights()[name] for name in stage if rank == 0}})

        broken = {"model": {f"stage_{rank}": (lambda: None) if rank else 0}}
        with pytest.raises(CheckpointError, match="step_00000002 was not written: Can't pickle"):
            checkpointer.save(2, broken, {}, asynchronous=False)
    dist.destroy_process_group()


def test_two_ranks_write_one_checkpoint_for_any_layout(folder: Path) -> None:
    torch.multiprocessing.spawn(save_on_two_ranks, args=(folder,), nprocs=2)
    assert [path.name for path in folder.iterdir()] == ["step_00000001"]
    checksums = json.loads((checkpoint_path(folder, 1) / "checksums.json").read_text())
    assert {"__0_0.distcp", "__1_0.distcp"} < checksums.keys()
    state = {"model": {name: torch.zeros_like(weight) for name, weight in weights().items()}, "counters": {"step": 0}}
    load_checkpoint(folder, state)
    assert_same(state, {"model": weights(), "counters": {"step": 1}})
