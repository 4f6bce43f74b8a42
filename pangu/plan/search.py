"""Finding the fastest layout that fits: best-first over closed-form estimates, simulating only what looks promising.

Every shape (sizes of the dimensions, schedule, micro-batch, ZeRO stage) has an estimate of its step time, on the low
side: the passes of the slowest rank in the best dealing of layers, and the time in which a pipeline must fill. Shapes
are evaluated by rising estimate, one kind (sizes of the dimensions) after the other, until no estimate is below the
slowest of the plans to be kept, or some hundreds have been. Evaluating a shape chooses, rank by rank, the cheapest
recomputation that fits and deals the layers (balance.py), then takes the step's time from the time model, which
simulates the pipeline. The best plans are polished by moving single layers.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pangu.config import Config
from pangu.plan.evaluate import Kind, Plan, Space
from pangu.plan.hardware import Cluster
from pangu.plan.space import FREE, Constraints, Shape, shapes

MOST_EVALUATIONS = 500
"""Shapes evaluated before a thorough search settles for what it has."""
EVALUATIONS_PER_KIND = 40
"""Shapes of one kind evaluated at most."""
MOST_WAYS = 64
"""Ways in which tensor and context parallelism may divide a layer, at most, when a larger cluster is looked for."""
POLISHED = 12
"""Of the best plans, whose layer lists are improved by moving single layers."""


@dataclass
class Search:
    """What a search looked at and found, the fastest plan first."""

    plans: list[Plan] = field(default_factory=list)
    considered: int = 0
    """Shapes that could run, memory aside."""
    evaluated: int = 0
    """Shapes whose layers were dealt and whose pipeline was simulated."""
    unseen: float = math.inf
    """Least estimate of the shapes that were not evaluated."""


Progress = Callable[[float, str], None]
"""Is told the share of the search that is done, and what has been found."""


def search(
    config: Config,
    cluster: Cluster,
    world_size: int,
    constraints: Constraints = FREE,
    keep: int = 10,
    progress: Progress = lambda share, text: None,
    evaluations: int = MOST_EVALUATIONS,
) -> Search:
    """The `keep` fastest layouts of the first phase of `config` on `world_size` devices of `cluster`.

    Nothing is found when nothing fits; `Search` says how much was looked at. Fewer `evaluations` than the default make
    it quick: it then polishes the first two plans only.
    """
    result, space = Search(), Space(config, cluster, constraints)
    kinds: dict[Kind, list[Shape]] = {}
    for shape in shapes(config, world_size, cluster.node.devices, constraints):
        kinds.setdefault(space.kind(shape), []).append(shape)
        result.considered += 1
    thorough = evaluations == MOST_EVALUATIONS
    result.plans = _best_of_kinds(
        space, list(kinds.values()), max(keep, POLISHED) if thorough else keep + 1, evaluations, result, progress
    )
    for index, plan in enumerate(result.plans):
        progress(1.0, f"moving single layers, plan {index + 1} of {len(result.plans)}")
        result.plans[index] = space.polish(plan)
    runnable = filter(space.accepted, sorted(result.plans, key=lambda plan: plan.time.step))
    result.plans = list(itertools.islice(runnable, keep))
    return result


def _best_of_kinds(
    space: Space, kinds: list[list[Shape]], keep: int, evaluations: int, result: Search, progress: Progress
) -> list[Plan]:
    """The fastest plan of each of the `keep` fastest kinds, by rising estimate until none is expected among them."""
    queue = [(min(map(space.estimate, members)), False, index) for index, members in enumerate(kinds)]
    heapq.heapify(queue)
    found: list[Plan] = []
    while queue and queue[0][0] < _limit(found, keep) and result.evaluated < evaluations:
        _, with_memory, index = heapq.heappop(queue)
        share = 1 - len(queue) / len(kinds)
        progress(share, f"{result.evaluated:,} layouts simulated, best {_limit(found, 1):.3g} s")
        if with_memory:
            plan, unseen = _best_of_kind(space, kinds[index], _limit(found, keep), result)
            found += [plan] if plan else []
            result.unseen = min(result.unseen, unseen)
        else:
            heapq.heappush(queue, (next(_by_estimate(space, kinds[index]), (math.inf,))[0], True, index))
    result.unseen = min([result.unseen, *(estimate for estimate, *_ in queue)])
    return sorted(found, key=lambda plan: plan.time.step)[:keep]


def _best_of_kind(space: Space, kind: list[Shape], limit: float, result: Search) -> tuple[Plan | None, float]:
    """The fastest plan of a kind, and the least estimate of its shapes that were not simulated."""
    best, sharding_costs_only, left = None, set(), EVALUATIONS_PER_KIND
    for estimate, shape in _by_estimate(space, kind):
        if estimate >= limit or left == 0:
            return best, estimate
        zero_1 = dataclasses.replace(shape, zero_stage=1)
        if zero_1 in sharding_costs_only:
            continue
        left -= 1
        result.evaluated += 1
        plan = space.evaluate(shape)
        if plan is None:
            continue
        if shape == zero_1 and set(plan.job.recompute) == {"none"}:
            sharding_costs_only.add(shape)
        if best is None or plan.time.step < best.time.step:
            best, limit = plan, min(limit, plan.time.step)
    return best, math.inf


def _by_estimate(space: Space, kind: list[Shape]) -> Iterator[tuple[float, Shape]]:
    """Shapes that can fit by rising `estimate_with_memory`, which is taken of no more of them than it must."""
    queue = [(space.estimate(shape), False, number) for number, shape in enumerate(kind)]
    heapq.heapify(queue)
    while queue:
        estimate, with_memory, number = heapq.heappop(queue)
        if with_memory:
            yield estimate, kind[number]
        else:
            estimate = space.estimate_with_memory(kind[number])
            if math.isfinite(estimate):
                heapq.heappush(queue, (estimate, True, number))


def _limit(found: Sequence[Plan], keep: int) -> float:
    """Seconds that a further plan must beat to be one of the `keep` fastest."""
    return sorted(plan.time.step for plan in found)[keep - 1] if len(found) >= keep else math.inf


def smallest_cluster(config: Config, cluster: Cluster, devices: int) -> int | None:
    """The fewest devices, more than `devices`, on which some layout of the first phase fits; None when none does.

    Whole nodes, in steps of an eighth of the size; doubling first.
    """
    too_few, enough = devices, max(devices, cluster.node.devices)
    while not _fits_somewhere(config, cluster, enough):
        too_few, enough = enough, 2 * enough
        if cluster.network is None or enough > config.phases[0].batch_size * config.model.num_layers * MOST_WAYS:
            return None
    step = -(-max(too_few // 8, 1) // cluster.node.devices) * cluster.node.devices
    sizes = range(too_few // cluster.node.devices * cluster.node.devices + step, enough, step)
    return next((size for size in sizes if _fits_somewhere(config, cluster, size)), enough)


def _fits_somewhere(config: Config, cluster: Cluster, devices: int) -> bool:
    """Whether any layout fits: judged on one sequence per micro-batch, and parameters sharded as far as they can be."""
    space = Space(config, cluster, FREE)
    smallest = Constraints(micro_batch_size=1, zero_stage=3)
    candidates = shapes(config, devices, cluster.node.devices, smallest)
    return any(math.isfinite(space.estimate_with_memory(shape)) and space.evaluate(shape) for shape in candidates)
