"""One rank of a job of any size, on this process alone: its code runs, its tensors and its process group are fake.

The layout is the job's, the parallelism and the training step are the real ones. Nothing is computed and nothing sent,
so that neither memory nor other ranks are needed; what is counted is what every operator would allocate, compute and
send.
"""

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from pangu.config import Config
from pangu.data.batch import Batch
from pangu.data.schedule import Schedule
from pangu.errors import ConfigError, PanguError, TrainingError
from pangu.model.local import local
from pangu.parallel.layout import Layout
from pangu.parallel.mesh import Mesh, make_mesh
from pangu.parallel.model import ParallelModel, assemble
from pangu.plan.npu import attention_mask
from pangu.plan.recorder import Counts, Peak, Recorder, Traffic
from pangu.train.trainer import Learner

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class DryRun:
    """What a rank does in one optimizer step."""

    rank: int
    coordinates: dict[str, int]
    stages: dict[int, int]
    """Parameters of the pipeline stages that the rank holds, before they are sharded over data-parallel ranks."""
    micro_batches: int
    executed: int
    """Micro-batches of the longest step that ran; `counts` are of all, in proportion."""
    peak: Peak
    between_steps: int
    """Bytes in memory before a step."""
    counts: Counts
    seconds: float
    resident_bytes: int
    """Of this process, at most."""


def dry_run(config: Config, layout: Layout, rank: int, micro_batches: int | None = None) -> DryRun:
    """One step of the first phase of `config` by `rank` of `layout`, at the batch size that the phase begins with.

    Every sequence is one document. Where train.device is "npu", memory is that of an NPU's operators.
    With `micro_batches` two shorter steps run, the second of at least so many: with a full pipeline operators, FLOPs
    and bytes grow by the same amount for every further micro-batch, memory not at all.

    Raises `ConfigError` for a rank outside the layout, `TrainingError` with what the real run would fail with.
    """
    if not 0 <= rank < layout.world_size:
        raise ConfigError(f"--rank {rank} is not one of the {layout.world_size:,} ranks 0 to {layout.world_size - 1:,}")
    started = time.perf_counter()
    total = config.phases[0].batch_size // (config.train.micro_batch_size * layout.dp)
    counts = _shorter_steps(layout, total, micro_batches)
    config = dataclasses.replace(
        config, metrics=dataclasses.replace(config.metrics, statistics_interval=0, peak_flops=1.0)
    )
    with _fake_process_group(rank, layout.world_size), _as_in_the_run(layout, rank):
        steps, stages, static = _run(config, layout, counts)
    last, peak = steps[-1]
    return DryRun(
        rank=rank,
        coordinates=layout.coordinates(rank),
        stages=stages,
        micro_batches=total,
        executed=counts[-1],
        peak=peak,
        between_steps=static,
        counts=last if counts[-1] == total else extrapolated(steps[0][0], last, counts, total),
        seconds=time.perf_counter() - started,
        resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def _shorter_steps(layout: Layout, total: int, wanted: int | None) -> list[int]:
    """Micro-batches of the steps to run: of one whole step, or of two shorter ones with a full pipeline.

    Interleaved schedules take micro-batches in rounds of equal size, and only whole rounds look alike.
    """
    if wanted is None:
        return [total]
    if wanted < 1:
        raise ConfigError(f"--micro-batches must be at least 1, got {wanted}")
    unit = 1 if layout.pp == 1 else total // max(1, total // layout.pp)
    least = 2 if layout.pp == 1 else 2 * unit
    longer = max(-(-wanted // unit) * unit, least + unit)
    return [total] if longer >= total else [longer - unit, longer]


def extrapolated(shorter: Counts, longer: Counts, steps: list[int], total: int) -> Counts:
    """Counts of a step of `total` micro-batches from those of two steps of fewer: a + b m."""
    first, second = steps

    def line(a: float, b: float) -> int:
        return round(b + (b - a) * (total - second) / (second - first))

    result = Counts()
    for name, count in longer.operators.items():
        result.operators[name] = line(shorter.operators[name], count)
    for key, of_kind in longer.flops.items():
        result.flops[key] = line(shorter.flops[key], of_kind)
    for where, traffic in longer.traffic.items():
        less = shorter.traffic[where]
        result.traffic[where] = Traffic(line(less.calls, traffic.calls), line(less.sent, traffic.sent))
    return result


@contextmanager
def _fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    if dist.is_initialized():
        raise ConfigError("a dry run makes a process group of its own, and this process has one already")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _as_in_the_run(layout: Layout, rank: int) -> Iterator[None]:
    """An error of the run's own code is reported as the launcher would: with the rank and its place."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it would print a traceback before the message
    try:
        yield
    except (PanguError, KeyboardInterrupt):
        raise
    except Exception as error:
        place = ", ".join(f"{name} {index}" for name, index in layout.coordinates(rank).items())
        raise TrainingError(f"the run would fail on rank {rank} ({place}): {type(error).__name__}: {error}") from error
    finally:
        logger.setLevel(level)


def _run(config: Config, layout: Layout, counts: list[int]) -> tuple[list[tuple[Counts, Peak]], dict[int, int], int]:
    schedule = Schedule(config)
    mesh = make_mesh(layout, "cpu") if layout.world_size > 1 else None
    parts = assemble(config, layout, mesh)
    pp_rank = 0 if mesh is None else mesh.coordinates["pp"]
    staged = list(zip(layout.stages_of(pp_rank) if layout.pp > 1 else (0,), parts, strict=True))
    stages = {stage: sum(_local_size(p) for p in part.parameters()) for stage, part in staged}
    steps = []
    on_npu = config.train.device == "npu"
    recorder = Recorder(_dimensions(mesh), on_npu)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, recorder.watching(staged):
        for part in parts:
            part.to_empty(device=_CPU)
        learner = Learner(config, schedule, ParallelModel(config, layout, mesh, parts, _CPU))
        _mark_state(recorder, learner)
        constants = [attention_mask()] if on_npu else []
        recorder.mark((("attention", constant) for constant in constants), "constants")
        static, batch = recorder.live, _batch(config)
        for count in counts:
            recorder.restart()
            learner.step(schedule.at(0), [batch] * count)
            steps.append((recorder.counts, recorder.peak()))
    return steps, stages, static


def _local_size(parameter: torch.Tensor) -> int:
    """Values of a parameter on one tensor-parallel rank, before FSDP shards it."""
    if not isinstance(parameter, DTensor):
        return parameter.numel()
    mesh, count = parameter.device_mesh, parameter.numel()
    for name, size, placement in zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True):
        if name == "tp" and placement.is_shard():
            count //= size
    return count


def _dimensions(mesh: Mesh | None) -> dict[str, str]:
    if mesh is None:
        return {}
    assert dist.group.WORLD is not None
    names: dict[str, str] = {dist.group.WORLD.group_name: "world"}
    for name in mesh.state.mesh_dim_names or ():
        names[mesh.state.get_group(name).group_name] = name
    if mesh.cp_group is not None:
        names[mesh.cp_group.group_name] = "cp"
    return names


def _mark_state(recorder: Recorder, learner: Learner) -> None:
    parameters = learner.model.parameters
    recorder.mark(((_module(name), local(parameter.data)) for name, parameter in parameters.items()), "parameters")
    for moments in (learner.optimizer.exp_avg, learner.optimizer.exp_avg_sq):
        recorder.mark(((_module(name), local(moment)) for name, moment in moments.items()), "optimizer state")


def _module(parameter_name: str) -> str:
    return parameter_name.rpartition(".")[0]


def _batch(config: Config) -> Batch:
    sequences, length = config.train.micro_batch_size, config.phases[0].sequence_length
    tokens, labels, positions = (torch.zeros(sequences * length, dtype=torch.int64) for _ in range(3))
    with _disable_current_modes():
        cu_seqlens = torch.arange(0, sequences * length + 1, length, dtype=torch.int32)
    return Batch(tokens, labels, positions, cu_seqlens)
