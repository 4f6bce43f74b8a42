"""How fast one device multiplies matrices, computes element by element, and moves memory."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pangu import device
from pangu.config import Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Scale:
    """How much to measure: enough for a device's rates, and no more than a laptop can stand."""

    squares: tuple[int, ...]
    """Sides of square matmuls."""
    largest_product: float
    """FLOPs of a matmul above which the config's own shapes are left out."""
    copied_bytes: int
    vector_numbers: int
    """As many as a cache holds."""
    seconds: float
    """Time spent on each figure."""
    message_bytes: int
    """Of collectives whose bandwidth is measured."""


ACCELERATOR = Scale((512, 1024, 2048, 4096, 8192), 1e14, 1 << 30, 1 << 22, 0.3, 1 << 26)
CPU = Scale((64, 128, 256, 512, 1024), 2e10, 1 << 27, 1 << 15, 0.2, 1 << 22)
EMULATED = Scale((64, 128, 256), 1e8, 1 << 20, 1 << 12, 0.05, 1 << 16)


def scale_of(target: torch.device, emulated: bool) -> Scale:
    return EMULATED if emulated else CPU if target.type == "cpu" else ACCELERATOR


@dataclass(frozen=True)
class Matmul:
    """`[m, k] x [k, n]`; name says which of the config's matmuls has this shape."""

    name: str
    dtype: str
    m: int
    n: int
    k: int
    flops_per_second: float


@dataclass(frozen=True)
class Memory:
    """Bytes per second; a copy counts what it reads and what it writes. Host figures are nan on a CPU."""

    copy: float
    host_to_device: float
    device_to_host: float
    vector_flops_per_second: float


def matmuls(config: Config, target: torch.device, scale: Scale) -> Iterator[Matmul]:
    """Squares of every size, and the shapes that a rank of `config` multiplies, in fp32 and bf16."""
    shapes = [("square", size, size, size) for size in scale.squares]
    shapes += [shape for shape in _shapes_of(config) if 2.0 * shape[1] * shape[2] * shape[3] <= scale.largest_product]
    for dtype, kind in DTYPES.items():
        for name, m, n, k in shapes:
            left, right = torch.randn(m, k).to(target, kind), torch.randn(k, n).to(target, kind)
            out = torch.empty(m, n, device=target, dtype=kind)
            seconds = best_seconds(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), target, scale.seconds)  # type: ignore[misc]
            yield Matmul(name, dtype, m, n, k, 2.0 * m * n * k / seconds)


def memory(target: torch.device, scale: Scale) -> Memory:
    source = torch.ones(scale.copied_bytes // 4, device=target)
    copy = torch.empty_like(source)
    copied = best_seconds(lambda: copy.copy_(source), target, scale.seconds)
    numbers = torch.ones(scale.vector_numbers, device=target)
    result = torch.empty_like(numbers)
    vector = best_seconds(lambda: torch.addcmul(numbers, numbers, numbers, out=result), target, scale.seconds)
    up = down = float("nan")
    if target.type != "cpu":
        host = torch.ones(scale.copied_bytes // 4).pin_memory()
        up = host.nbytes / best_seconds(lambda: copy.copy_(host, non_blocking=True), target, scale.seconds)
        down = host.nbytes / best_seconds(lambda: host.copy_(source, non_blocking=True), target, scale.seconds)
    return Memory(2 * source.nbytes / copied, up, down, 2 * numbers.numel() / vector)


def best_seconds(run: Callable[[], Any], target: torch.device, seconds: float) -> float:
    """Of one call, the least over blocks of calls; a block is waited for once, so that launching is not counted."""
    run()
    device.synchronize(target)
    calls, best, end = 1, float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        device.synchronize(target)
        now = time.perf_counter()
        best = min(best, (now - start) / calls)
        if now >= end:
            return best
        if now - start < seconds / 10:
            calls *= 2


def _shapes_of(config: Config) -> list[tuple[str, int, int, int]]:
    """Forward matmuls of a block and of the head, per rank: (name, tokens, columns, depth)."""
    model, parallel = config.model, config.parallel
    tokens = config.train.micro_batch_size * max(phase.sequence_length for phase in config.phases) // parallel.cp
    tokens = min(tokens, 8192)  # more rows than that make no matmul faster
    hidden, tp = model.hidden_size, parallel.tp
    return [
        ("query", tokens, model.query_size // tp, hidden),
        ("key_value", tokens, max(2 * model.key_value_size // tp, 1), hidden),
        ("attention_output", tokens, hidden, model.query_size // tp),
        ("gate_up", tokens, 2 * model.intermediate_size // tp, hidden),
        ("down", tokens, hidden, model.intermediate_size // tp),
        ("head_chunk", min(tokens, 1024), model.vocab_size // tp, hidden),
    ]
