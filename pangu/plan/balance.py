"""How many layers each pipeline rank and stage gets, so that no rank is slower or fuller than it must be.

Yuan 2.0's non-uniform pipeline (arXiv 2311.15786, section 3.4.1) by dynamic programming: ranks that hold many
micro-batches, or the embedding or the head, get fewer layers.
"""

import math
import operator
from collections.abc import Callable, Sequence

_MEMORY_WEIGHT = 1e-3
"""Of memory beside time, where both are shares of their limits: memory only decides between equal times."""


def deal_layers(num_layers: int, seconds: Sequence[Sequence[float]], memory: Sequence[Sequence[float]]) -> list[int]:
    """Layers per rank, `num_layers` in all: the least time of the slowest rank, and then ranks as even as possible.

    `seconds[rank][n]` is a rank's time per micro-batch with n layers, `memory[rank][n]` its peak memory as a share of
    what there is; n layers on a rank are possible when that is at most 1. Even means the least sum of squared times, of
    equals the least sum of squared memory. Exact for any such tables. Returns an empty list when nothing fits.
    """
    allowed = [
        [second if share <= 1 else math.inf for second, share in zip(*rank, strict=True)]
        for rank in zip(seconds, memory, strict=True)
    ]
    slowest, _ = _deal(num_layers, allowed, max)
    if math.isinf(slowest):
        return []
    unevenness = [
        [
            (second / slowest) ** 2 + _MEMORY_WEIGHT * share**2 if second <= slowest else math.inf
            for second, share in zip(*rank, strict=True)
        ]
        for rank in zip(allowed, memory, strict=True)
    ]
    return _deal(num_layers, unevenness, operator.add)[1]


def _deal(
    num_layers: int, cost: Sequence[Sequence[float]], combine: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The least combined cost, and layers per rank that have it, of all ways to deal the layers."""
    best = [0.0] + [math.inf] * num_layers  # by layers dealt so far
    choices: list[list[int]] = []
    for rank_cost in cost:
        following, chosen = [math.inf] * (num_layers + 1), [0] * (num_layers + 1)
        for n, own in enumerate(rank_cost):
            if math.isinf(own):
                continue
            for dealt in range(num_layers - n + 1):
                total = combine(best[dealt], own)
                if total < following[dealt + n]:
                    following[dealt + n], chosen[dealt + n] = total, n
        best = following
        choices.append(chosen)
    layers, left = [], num_layers
    for chosen in reversed(choices):
        layers.append(chosen[left])
        left -= chosen[left]
    return best[num_layers], layers[::-1]


def split_among_stages(layers: int, extra_loads: Sequence[float]) -> list[int]:
    """A rank's layers over its virtual stages: at least one each, the heaviest stage as light as possible.

    `extra_loads` are what stages carry besides, in layers (embedding, head). Later stages come first among equals:
    their micro-batches are in flight for a shorter time.
    """
    counts = [1] * len(extra_loads)
    for _ in range(layers - len(counts)):
        lightest = min(range(len(counts)), key=lambda stage: (counts[stage] + extra_loads[stage], -stage))
        counts[lightest] += 1
    return counts
