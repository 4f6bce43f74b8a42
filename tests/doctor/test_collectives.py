"""Which groups a config exchanges in, and which of them fit into a node."""

import pytest

from pangu import config as configuration
from pangu.doctor.collectives import Shape, shapes


def of(world_size: int, **parallel: int) -> tuple[list[tuple[str, int, int]], list[tuple[str, int, int]]]:
    words = [word for name, value in parallel.items() for word in (f"--parallel.{name}", str(value))]
    fitting, missing = shapes(configuration.load("debug", words).parallel, world_size)
    return tuple([(s.dimension, s.size, s.stride) for s in part] for part in (fitting, missing))  # type: ignore[return-value]


def test_groups_lie_as_in_the_layout() -> None:
    fitting, missing = of(8, tp=2, cp=2, dp_shard=2)
    assert fitting[:3] == [("tp", 2, 1), ("cp", 2, 2), ("dp_shard", 2, 4)]
    assert fitting[3:] == [("node", 2, 1), ("node", 4, 1), ("node", 8, 1)]
    assert missing == []


def test_data_parallel_ranks_fill_the_node_unless_they_are_given() -> None:
    assert of(8, tp=4)[0][:2] == [("tp", 4, 1), ("dp_shard", 2, 4)]
    assert of(8, tp=4, dp_shard=16) == (
        [("tp", 4, 1), ("node", 2, 1), ("node", 4, 1), ("node", 8, 1)],
        [("dp_shard", 16, 4)],
    )


def test_what_spans_nodes_is_named() -> None:
    _, missing = of(4, tp=4, dp_shard=1, dp_replicate=2, pp=8)
    assert missing == [("dp_replicate", 2, 4), ("pp", 8, 8)]


def test_a_single_device_exchanges_nothing() -> None:
    assert of(1) == ([], [])


@pytest.mark.parametrize(
    ("shape", "world_size", "groups"),
    [
        (Shape("tp", 2, 1, ()), 4, [[0, 1], [2, 3]]),
        (Shape("cp", 2, 2, ()), 4, [[0, 2], [1, 3]]),
        (Shape("cp", 2, 2, ()), 7, [[0, 2], [1, 3]]),
        (Shape("node", 3, 1, ()), 3, [[0, 1, 2]]),
    ],
)
def test_groups_of_a_shape(shape: Shape, world_size: int, groups: list[list[int]]) -> None:
    assert shape.groups(world_size) == groups


def test_collectives_are_those_that_the_config_uses() -> None:
    def used(*words: str) -> dict[str, tuple[str, ...]]:
        fitting, _ = shapes(configuration.load("debug", words).parallel, 4)
        return {shape.dimension: shape.collectives for shape in fitting}

    both = ("--parallel.tp", "2", "--parallel.cp", "2")
    assert used(*both)["tp"] == ("all_gather", "reduce_scatter")
    assert used(*both)["cp"] == ("send_recv",)
    assert used(*both, "--parallel.sequence_parallel", "false")["tp"] == ("all_reduce",)
    assert used(*both, "--parallel.context_exchange", "all_gather")["cp"] == ("all_gather", "reduce_scatter")
