"""The one-stage-per-rank zero-bubble schedules (Qi et al. 2023): ZB-1p with 1F1B's memory, ZB-2p with twice as much.

No framework here runs them; published measurements do. As in the paper's heuristic a rank that is free takes the first
of these that it can: a backward pass for activations, a forward pass within the memory limit, a gradient of weights.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

from pangu.plan.simulate import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Action, Order

LIMITS = {"zb-1p": 1, "zb-2p": 2}
"""Micro-batches in flight on a rank, in multiples of the number of ranks (less one in the second)."""

Durations = tuple[tuple[float, float, float], ...]
"""Of every rank: a forward pass, a backward pass for activations, a gradient of weights."""


@lru_cache(maxsize=64)
def zero_bubble_order(schedule: str, micro_batches: int, durations: Durations) -> Order:
    """The order of passes that the heuristic finds for such durations, of which only the proportions matter."""
    pp = len(durations)
    limit = LIMITS[schedule] * pp - (schedule == "zb-2p")
    end: dict[Action, float] = {}
    ranks: list[list[Action]] = [[] for _ in range(pp)]
    counts = [[0, 0, 0] for _ in range(pp)]
    clock = [0.0] * pp
    while any(count != [micro_batches] * 3 for count in counts):
        left = [rank for rank in range(pp) if counts[rank] != [micro_batches] * 3]
        now = min(clock[rank] for rank in left)
        for rank in left:
            if clock[rank] > now:
                continue
            action = _choose(rank, pp, micro_batches, limit, counts[rank], end, now)
            if action is None:
                continue
            kind = (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT).index(action.kind)
            end[action] = clock[rank] = now + durations[rank][kind]
            ranks[rank].append(action)
            counts[rank][kind] += 1
        following = min((moment for moment in clock if moment > now), default=now)
        clock = [max(moment, following) for moment in clock]
    return Order(schedule, pp, 1, micro_batches, tuple(map(tuple, ranks)))


def _choose(
    rank: int, pp: int, micro_batches: int, limit: int, counts: Sequence[int], end: dict[Action, float], now: float
) -> Action | None:
    forwards, inputs, weights = counts

    def ready(source: Action) -> bool:
        return end.get(source, math.inf) <= now

    source = Action(FORWARD, rank, inputs) if rank == pp - 1 else Action(BACKWARD_INPUT, rank + 1, inputs)
    if inputs < forwards and ready(source):
        return Action(BACKWARD_INPUT, rank, inputs)
    room = forwards < micro_batches and forwards - weights < limit
    if room and (not rank or ready(Action(FORWARD, rank - 1, forwards))):
        return Action(FORWARD, rank, forwards)
    return Action(BACKWARD_WEIGHT, rank, weights) if weights < inputs else None
