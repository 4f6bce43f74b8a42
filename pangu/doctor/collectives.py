"""How fast groups of devices exchange, in the shapes that a config uses, and whether what arrives is right."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from pangu_kernels.overlap import all_gather_matmul, matmul_reduce_scatter
from torch import Tensor

from pangu import device
from pangu.config import ParallelConfig
from pangu.doctor.rates import Scale

_SMALL_BYTES = 1024
_BLOCKS = 3


@dataclass(frozen=True)
class Shape:
    """Groups of `size` ranks that lie `stride` apart. dimension: of the layout, or "node" for neighbours."""

    dimension: str
    size: int
    stride: int
    collectives: tuple[str, ...]

    def groups(self, world_size: int) -> list[list[int]]:
        """All groups of this shape; ranks at the end that fill none are left out."""
        span = self.size * self.stride
        return [
            list(range(first, first + span, self.stride))
            for start in range(0, world_size - span + 1, span)
            for first in range(start, start + self.stride)
        ]


@dataclass(frozen=True)
class Exchange:
    """One collective in groups of one shape, all at once. Bytes are what every device sends, and receives."""

    dimension: str
    size: int
    stride: int
    collective: str
    bytes_sent: int
    bytes_per_second: float
    latency_seconds: float
    correct: bool


def shapes(parallel: ParallelConfig, world_size: int) -> tuple[list[Shape], list[Shape]]:
    """What a config exchanges, as far as it fits into `world_size` ranks, and what does not; then neighbours in groups
    of 2, 4, ... and all, from which a planner learns the links."""
    tensor = ("all_gather", "reduce_scatter") if parallel.sequence_parallel else ("all_reduce",)
    context = ("send_recv",) if parallel.context_exchange == "ring" else ("all_gather", "reduce_scatter")
    fill = max(1, world_size // (parallel.tp * parallel.cp))
    wanted, stride = [], 1
    for dimension, size, collectives in (
        ("tp", parallel.tp, tensor),
        ("cp", parallel.cp, context),
        ("dp_shard", parallel.dp_shard or fill, ("all_gather", "reduce_scatter")),
        ("dp_replicate", parallel.dp_replicate, ("all_reduce",)),
        ("pp", parallel.pp, ("send_recv",)),
    ):
        if size > 1:
            wanted.append(Shape(dimension, size, stride, collectives))
        stride *= size
    neighbours = sorted({2**power for power in range(1, 10) if 2**power < world_size} | {world_size})
    every = ("all_gather", "reduce_scatter", "all_reduce", "send_recv")
    fitting = [shape for shape in wanted if shape.size * shape.stride <= world_size]
    node = [Shape("node", size, 1, every) for size in neighbours if size > 1]
    return fitting + node, [shape for shape in wanted if shape not in fitting]


def measure(parallel: ParallelConfig, target: torch.device, scale: Scale) -> Iterator[Exchange]:
    """Every shape in turn. All ranks of the default process group call it; a rank in no group waits."""
    fitting, _ = shapes(parallel, dist.get_world_size())
    for shape in fitting:
        own = None
        for ranks in shape.groups(dist.get_world_size()):
            group = dist.new_group(ranks)
            own = group if dist.get_rank() in ranks else own
        for collective in shape.collectives:
            dist.barrier()
            if own is not None:
                yield _exchange(shape, collective, own, target, scale)
        if own is not None:
            dist.destroy_process_group(own)


def check_overlap(target: torch.device) -> dict[str, float]:
    """Largest difference of every mode of the overlap operators from the reference mode, over outputs and gradients,
    as a share of the largest value, on all ranks. Modes a device does not have are left out."""
    group = dist.group.WORLD
    assert group is not None
    modes = ["chunked", *(["fused"] if target.type == "npu" and group.size() in (2, 4, 8) else [])]
    size, dtype = group.size(), torch.float32 if target.type == "cpu" else torch.bfloat16
    torch.manual_seed(dist.get_rank())
    rows = torch.randn(64, 256).to(target, dtype)
    columns = torch.randn(64 * size, 256).to(target, dtype)
    weight = (torch.randn(256, 256) / 16).to(target, dtype)

    def gather(mode: str) -> list[Tensor]:
        x, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        (y,) = all_gather_matmul(x, [w], group, mode=mode)
        return [y, *torch.autograd.grad(y.float().sum(), (x, w))]

    def scatter(mode: str) -> list[Tensor]:
        x, w = columns.clone().requires_grad_(), weight.clone().requires_grad_()
        y = matmul_reduce_scatter(x, w, group, mode=mode)
        return [y, *torch.autograd.grad(y.float().sum(), (x, w))]

    differences = {}
    for name, run in (("all_gather_matmul", gather), ("matmul_reduce_scatter", scatter)):
        expected = run("reference")
        for mode in modes:
            pairs = zip(run(mode), expected, strict=True)
            errors = [((a - b).abs().max() / b.abs().max()).float().cpu() for a, b in pairs]
            differences[f"{name} {mode}"] = float(torch.stack(errors).max())
    return differences


def _exchange(shape: Shape, collective: str, group: dist.ProcessGroup, target: torch.device, scale: Scale) -> Exchange:
    small, _ = _COLLECTIVES[collective](group, target, _SMALL_BYTES)
    latency = _seconds(small, target, calls=20)
    run, check = _COLLECTIVES[collective](group, target, scale.message_bytes)
    seconds = _seconds(run, target, calls=5)
    sent = _bytes_sent(collective, scale.message_bytes, shape.size)
    return Exchange(shape.dimension, shape.size, shape.stride, collective, sent, sent / seconds, latency, check())


def _seconds(run: Callable[[], object], target: torch.device, calls: int) -> float:
    """Of one call, the least over blocks: as many on every rank, whatever each of them measures."""
    run()
    best = float("inf")
    for _ in range(_BLOCKS):
        device.synchronize(target)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        device.synchronize(target)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def _bytes_sent(collective: str, message: int, size: int) -> int:
    if collective == "send_recv":
        return message
    share = message * (size - 1) // size
    return 2 * share if collective == "all_reduce" else share


Run = tuple[Callable[[], object], Callable[[], bool]]
"""What is timed, and whether it has done what it should."""


def _all_gather(group: dist.ProcessGroup, target: torch.device, message: int) -> Run:
    size, rank = group.size(), group.rank()
    own = torch.full((_numbers(message, size),), float(rank), device=target)
    out = torch.empty(size * own.numel(), device=target)

    def check() -> bool:
        expected = torch.arange(size, dtype=torch.float32).repeat_interleave(own.numel())
        return torch.equal(out.cpu(), expected)

    return lambda: dist.all_gather_into_tensor(out, own, group=group), check


def _reduce_scatter(group: dist.ProcessGroup, target: torch.device, message: int) -> Run:
    size, rank = group.size(), group.rank()
    count = _numbers(message, size)
    whole = (torch.arange(size, dtype=torch.float32).repeat_interleave(count) + rank).to(target)
    out = torch.empty(count, device=target)
    expected = torch.full((count,), size * rank + size * (size - 1) / 2)
    return lambda: dist.reduce_scatter_tensor(out, whole, group=group), lambda: torch.equal(out.cpu(), expected)


def _all_reduce(group: dist.ProcessGroup, target: torch.device, message: int) -> Run:
    """In place, as gradients are: after the first call every rank holds the same, and the largest stays."""
    buffer = torch.full((message // 4,), float(group.rank()), device=target)
    largest = torch.full((message // 4,), float(group.size() - 1))
    return (
        lambda: dist.all_reduce(buffer, dist.ReduceOp.MAX, group=group),
        lambda: torch.equal(buffer.cpu(), largest),
    )


def _send_recv(group: dist.ProcessGroup, target: torch.device, message: int) -> Run:
    """Every rank sends to the next and receives from the one before, around the group."""
    size, rank = group.size(), group.rank()
    own, received = (torch.full((message // 4,), float(rank), device=target) for _ in range(2))

    def run() -> None:
        operations = [
            dist.P2POp(dist.isend, own, group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    expected = torch.full((message // 4,), float((rank - 1) % size))
    return run, lambda: torch.equal(received.cpu(), expected)


def _numbers(message: int, size: int) -> int:
    """fp32 numbers of a rank's part of a message of so many bytes."""
    return max(1, message // 4 // size)


_COLLECTIVES: dict[str, Callable[[dist.ProcessGroup, torch.device, int], Run]] = {
    "all_gather": _all_gather,
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "send_recv": _send_recv,
}
