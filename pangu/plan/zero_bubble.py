"""The one-stage-per-rank zero-bubble schedules (Qi et al. 2023): ZB-1p with 1F1B's memory, ZB-2p with twice as much.

No framework here runs them; published measurements do. As in the paper's heuristic a rank takes the first of these that
it can: a backward pass for activations, a forward pass within the memory limit, a gradient of weights.
"""

from functools import lru_cache

from pangu.plan.simulate import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Action, Order

LIMITS = {"zb-1p": 1, "zb-2p": 2}
"""Micro-batches in flight on a rank, in multiples of the number of ranks (less one in the second)."""


@lru_cache(maxsize=64)
def zero_bubble_order(schedule: str, pp: int, micro_batches: int) -> Order:
    """The order of passes when forward, both backward passes and nothing else take one unit of time each."""
    limit = LIMITS[schedule] * pp - (schedule == "zb-2p")
    done: dict[Action, int] = {}
    ranks: list[list[Action]] = [[] for _ in range(pp)]
    counts = [[0, 0, 0] for _ in range(pp)]  # forward, input, weight passes of every rank
    moment = 0
    while any(len(actions) < 3 * micro_batches for actions in ranks):
        chosen = [_choose(rank, pp, micro_batches, limit, counts[rank], done, moment) for rank in range(pp)]
        for rank, action in enumerate(chosen):
            if action is not None:
                ranks[rank].append(action)
                done[action] = moment
                counts[rank][(FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT).index(action.kind)] += 1
        moment += 1
    return Order(schedule, pp, 1, micro_batches, tuple(map(tuple, ranks)))


def _choose(
    rank: int, pp: int, micro_batches: int, limit: int, counts: list[int], done: dict[Action, int], moment: int
) -> Action | None:
    forwards, inputs, weights = counts

    def ready(source: Action) -> bool:
        return done.get(source, moment) < moment

    source = Action(FORWARD, rank, inputs) if rank == pp - 1 else Action(BACKWARD_INPUT, rank + 1, inputs)
    if inputs < forwards and ready(source):
        return Action(BACKWARD_INPUT, rank, inputs)
    room = forwards < micro_batches and forwards - weights < limit
    if room and (not rank or ready(Action(FORWARD, rank - 1, forwards))):
        return Action(FORWARD, rank, forwards)
    return Action(BACKWARD_WEIGHT, rank, weights) if weights < inputs else None
