"""The dealing of layers is the best there is, by comparison with every way of dealing."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu.plan.balance import deal_layers, split_among_stages


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_other_dealing_is_better(data: st.DataObject) -> None:
    ranks, num_layers = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 8))
    per_layer = data.draw(st.lists(st.integers(1, 4), min_size=ranks, max_size=ranks))
    extra = data.draw(st.lists(st.integers(0, 6), min_size=ranks, max_size=ranks))
    held = data.draw(st.lists(st.integers(1, 8), min_size=ranks, max_size=ranks))
    seconds = [
        [math.inf, *(n * each + more for n in range(1, num_layers + 1))]
        for each, more in zip(per_layer, extra, strict=True)
    ]
    memory = [[n * each / 16 for n in range(num_layers + 1)] for each in held]

    def cost(layers: tuple[int, ...]) -> tuple[float, float]:
        if any(memory[rank][n] > 1 for rank, n in enumerate(layers)):
            return math.inf, math.inf
        own = [seconds[rank][n] for rank, n in enumerate(layers)]
        held = [memory[rank][n] for rank, n in enumerate(layers)]
        return max(own), sum((each / max(own)) ** 2 for each in own) + 1e-3 * sum(each**2 for each in held)

    ways = [way for way in itertools.product(range(1, num_layers + 1), repeat=ranks) if sum(way) == num_layers]
    best = min(map(cost, ways), default=(math.inf, math.inf))
    dealt = deal_layers(num_layers, seconds, memory)
    if math.isinf(best[0]):
        assert dealt == []
    else:
        assert sum(dealt) == num_layers
        assert cost(tuple(dealt)) == pytest.approx(best)


def test_yuans_non_uniform_pipeline() -> None:
    """Figure 3: an even pipeline of 24 layers takes 78, 60, 46 and 64 GB on stages 1, 2, 7 and 8. Four values, four
    unknowns: a layer, a layer's input in flight, the embedding, the head. They give the paper's 56 and 39 GB of stages
    1 and 2 with two layers, and within 64 GB the first stage must have two."""
    in_flight = (60 - 46) / (21 - 6)
    layer = (60 - 21 * in_flight) / 3
    embedding, head = 78 - 3 * layer - 24 * in_flight, 64 - 3 * layer - 3 * in_flight
    extra = [embedding, 0, 0, 0, 0, 0, 0, head]
    gigabytes = [[n * (layer + in_flight * (8 - rank)) + extra[rank] for n in range(7)] for rank in range(8)]
    assert [round(gigabytes[rank][2]) for rank in (0, 1)] == [57, 40]
    seconds = [[math.inf, *(float(n) for n in range(1, 7))] for _ in range(8)]
    assert deal_layers(24, seconds, [[g / 78 for g in row] for row in gigabytes]) == [3] * 8
    dealt = deal_layers(24, seconds, [[g / 64 for g in row] for row in gigabytes])
    assert dealt[0] == 2
    assert max(dealt) == 4
    assert max(gigabytes[rank][n] for rank, n in enumerate(dealt)) <= 64


def test_chunks_with_the_embedding_or_the_head_are_lighter() -> None:
    assert split_among_stages(11, [1.4, 0, 0, 0, 0, 0]) == [1, 2, 2, 2, 2, 2]
    assert split_among_stages(11, [0, 0, 0, 0, 0, 1.4]) == [2, 2, 2, 2, 2, 1]
    assert split_among_stages(13, [0.0] * 6) == [2, 2, 2, 2, 2, 3]
    assert split_among_stages(3, [9.0, 0, 0]) == [1, 1, 1]
