"""The dry run's peak of memory is that of real steps: of one process, of every rank of four, and on emulated NPUs."""

import dataclasses
import gc
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from cases import BF16, ZERO3, dims, schedule
from pangu_kernels import large_memory
from pangu_kernels.attention import ascend
from torch.profiler import ProfilerActivity, profile
from world import World

from pangu import config as configuration
from pangu.config import Config
from pangu.data.schedule import Schedule
from pangu.device.cann_emulator import emulated_npu
from pangu.parallel.layout import make_layout
from pangu.parallel.model import build_model
from pangu.plan.dryrun import _batch, dry_run
from pangu.plan.recorder import Recorder
from pangu.train.trainer import Learner

TOLERANCE = 0.05
WITHOUT_ROUNDING = 0.02
"""Of what is asked of an NPU's allocator. It gives whole blocks, of 512 bytes, with up to 1 MiB of one unused."""
HUNDREDS_OF_MEGABYTES = (
    *("--model.hidden_size", "512", "--model.num_attention_heads", "8", "--model.intermediate_size", "1408"),
    *("--model.vocab_size", "8192", "--phases.0.sequence_length", "512"),
)
TENS_OF_MEGABYTES = (
    *("--model.hidden_size", "256", "--model.num_attention_heads", "8", "--model.num_key_value_heads", "4"),
    *("--model.num_layers", "8", "--model.intermediate_size", "704", "--model.vocab_size", "1024"),
    *("--phases.0.sequence_length", "512", "--phases.0.batch_size", "4", "--train.micro_batch_size", "1"),
)
FOUR = {
    "tp2 x pp2": dims(tp=2, pp=2),
    "tp2 x dp2, zero 1": dims(tp=2),
    "tp2 x dp2, zero 2": (*dims(tp=2), "--parallel.zero_stage", "2"),
    "tp2 x dp2, zero 3": (*dims(tp=2), *ZERO3),
    "cp2 x dp2": dims(cp=2),
    "cp2 x tp2, all-gather": (*dims(cp=2, tp=2), "--parallel.context_exchange", "all_gather"),
    "pp2 interleaved x dp2": dims(pp=2) + schedule("interleaved_1f1b", 2, 2, 2, 2),
}


def load(*overrides: str) -> Config:
    config = configuration.load("debug", ("--metrics.tensorboard", "false", *overrides))
    return dataclasses.replace(
        config, metrics=dataclasses.replace(config.metrics, statistics_interval=0, peak_flops=1.0)
    )


def _learner(config: Config, size: int, target: torch.device) -> Learner:
    return Learner(config, Schedule(config), build_model(config, make_layout(config, size), target))


def _step(learner: Learner) -> None:
    config, layout = learner.config, learner.model.layout
    count = config.phases[0].batch_size // (config.train.micro_batch_size * layout.dp)
    learner.step(learner.schedule.at(learner.counters.step), [_batch(config)] * count)


def allocated(config: Config) -> int:
    """Bytes at the fullest moment of a step on this CPU, as its allocator reports them, kernels' own included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        _step(_learner(config, 1, torch.device("cpu")))
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def recorded(config: Config) -> int:
    """Bytes of all tensors at the fullest moment of this rank's step, computed and sent for real.

    An allocator's reports would be of no use: gloo copies on threads of its own, and frees what nobody reports.
    """
    recorder = Recorder({})
    with recorder:
        learner = _learner(config, dist.get_world_size(), torch.device("cpu"))
        with recorder.watching(list(enumerate(learner.model.parts))):
            _step(learner)
    return recorder.peak().total


def on_npu(config: Config) -> tuple[int, int]:
    """Most bytes that torch_npu's allocator gave, in whole blocks, and those asked for, of the second step."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    npu = torch.get_device_module("npu")
    gc.collect()
    ascend._mask.cache_clear()  # another run's constant
    before = npu.memory_stats()
    learner = _learner(config, size, torch.device("npu", rank))
    _step(learner)
    npu.synchronize()
    npu.reset_peak_memory_stats()
    _step(learner)
    npu.synchronize()
    after = npu.memory_stats()
    assert after["allocated_bytes.all.peak"] == npu.max_memory_allocated()
    given, asked = (
        after[f"{kind}_bytes.all.peak"] - before.get(f"{kind}_bytes.all.current", 0)
        for kind in ("allocated", "requested")
    )
    return given, asked


def predicted(config: Config, size: int = 1) -> list[int]:
    layout = make_layout(config, size)
    return [dry_run(config, layout, rank).peak.total for rank in range(size)]


def differences(predictions: list[int], measurements: list[int]) -> list[float]:
    return [predicted / measured - 1 for predicted, measured in zip(predictions, measurements, strict=True)]


def check_npu(predictions: list[int], measurements: list[tuple[int, int]]) -> None:
    given = differences(predictions, [each[0] for each in measurements])
    asked = differences(predictions, [each[1] for each in measurements])
    assert max(map(abs, given)) < TOLERANCE, (given, asked)
    assert max(map(abs, asked)) < WITHOUT_ROUNDING, (given, asked)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_one_process(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_memory, "LARGE", 2**60)  # reports of the allocator are all that is measured
    config = load(*HUNDREDS_OF_MEGABYTES, "--parallel.recompute.mode", mode)
    measured = allocated(config)
    assert measured > 300e6
    assert abs(predicted(config)[0] / measured - 1) < 0.01


@pytest.mark.parametrize("name", FOUR)
def test_every_rank_of_four(name: str, worlds: Callable[[int], World]) -> None:
    config = load(*TENS_OF_MEGABYTES, *FOUR[name])
    found = differences(predicted(config, 4), worlds(4).run(recorded, config))
    assert max(map(abs, found)) < TOLERANCE, found


NPU = ("--train.device", "npu")


@pytest.mark.ascend
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_one_emulated_npu(mode: str, dtype: str) -> None:
    recompute = ("--parallel.recompute.mode", mode)
    config = load(*TENS_OF_MEGABYTES, *NPU, "--phases.0.batch_size", "2", *recompute, "--train.dtype", dtype)
    with emulated_npu():
        measured = on_npu(config)
    check_npu(predicted(config), [measured])


@pytest.mark.ascend
@pytest.mark.parametrize("name", FOUR)
def test_every_one_of_four_emulated_npus(name: str, worlds: Callable[..., World]) -> None:
    config = load(*TENS_OF_MEGABYTES, *FOUR[name], *BF16, *NPU)
    check_npu(predicted(config, 4), worlds(4, "npu").run(on_npu, config))
