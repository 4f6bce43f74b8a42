"""How many layers each pipeline rank and stage gets, so that no rank is slower or fuller than it must be.

Yuan 2.0's non-uniform pipeline (arXiv 2311.15786, section 3.4.1) by dynamic programming: ranks that hold many
micro-batches, or the embedding or the head, get fewer layers.
"""

import math
from collections.abc import Sequence


def deal_layers(num_layers: int, seconds: Sequence[Sequence[float]], memory: Sequence[Sequence[float]]) -> list[int]:
    """Layers per rank, `num_layers` in all, with the least time of the slowest rank and then the least fill.

    `seconds[rank][n]` is a rank's time per micro-batch with n layers, `memory[rank][n]` its peak memory as a share of
    what there is; n layers on a rank are possible when that is at most 1. Exact for any such tables. Returns an empty
    list when nothing fits.
    """
    allowed = [
        [second if share <= 1 else math.inf for second, share in zip(*rank, strict=True)]
        for rank in zip(seconds, memory, strict=True)
    ]
    slowest = _deal(num_layers, allowed)
    if not slowest:
        return []
    bound = max(allowed[rank][n] for rank, n in enumerate(slowest))
    shares = [
        [share if second <= bound else math.inf for second, share in zip(*rank, strict=True)]
        for rank in zip(allowed, memory, strict=True)
    ]
    return _deal(num_layers, shares)


def _deal(num_layers: int, cost: Sequence[Sequence[float]]) -> list[int]:
    """Layers per rank with the least maximum of cost[rank][n]; empty when every way has an infinite one."""
    best = [0.0] + [math.inf] * num_layers  # by layers dealt so far
    choices: list[list[int]] = []
    for rank_cost in cost:
        following, chosen = [math.inf] * (num_layers + 1), [0] * (num_layers + 1)
        for n, own in enumerate(rank_cost):
            if math.isinf(own):
                continue
            for dealt in range(num_layers - n + 1):
                worst = max(best[dealt], own)
                if worst < following[dealt + n]:
                    following[dealt + n], chosen[dealt + n] = worst, n
        best = following
        choices.append(chosen)
    if math.isinf(best[num_layers]):
        return []
    layers, left = [], num_layers
    for chosen in reversed(choices):
        layers.append(chosen[left])
        left -= chosen[left]
    return layers[::-1]


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
