"""Who holds which tokens: exact for any documents, and balanced."""

import dataclasses
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu.config import load
from pangu.data.batch import Batch
from pangu.errors import ConfigError
from pangu.parallel.context_layout import Partition, backs, boundaries, fronts, halo, partition, prefixes, shard_batch
from pangu.parallel.layout import make_layout


def boundaries_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths of which many are below 2 cp, with a sum that cp divides."""
    size = draw(st.integers(1, 8))
    lengths = draw(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=12))
    lengths.append(-sum(lengths) % size)
    return draw(st.permutations(lengths)), size


def rows_by_the_rule(cut: Partition, rank: int) -> list[int]:
    """Piece by piece, without arithmetic on arrays."""
    rows: list[int] = []
    for starts in cut.pieces.tolist():
        for piece in (rank, 2 * cut.size - 1 - rank):
            rows += range(starts[piece], starts[piece + 1])
    return rows


@settings(deadline=None)
@given(documents())
def test_every_rank_gets_exactly_its_share_of_the_tokens(case: tuple[list[int], int]) -> None:
    lengths, size = case
    cut = partition(boundaries_of(lengths), size)
    assert cut.rows.shape == (size, sum(lengths) // size)
    assert sorted(cut.rows.ravel().tolist()) == list(range(sum(lengths)))
    for rank in range(size):
        assert cut.rows[rank].tolist() == rows_by_the_rule(cut, rank)
    ends = cut.rows.ravel()[cut.places] if sum(lengths) else np.arange(0)
    assert ends.tolist() == list(range(sum(lengths)))


@settings(deadline=None)
@given(documents())
def test_pieces_cover_their_document_and_differ_by_at_most_one_token(case: tuple[list[int], int]) -> None:
    lengths, size = case
    cu_seqlens = boundaries_of(lengths)
    pieces = partition(cu_seqlens, size).pieces
    assert pieces[:, 0].tolist() == cu_seqlens[:-1].tolist()
    assert pieces[:, -1].tolist() == cu_seqlens[1:].tolist()
    sizes = np.diff(pieces, axis=1)
    assert sizes.min() >= 0
    assert (sizes.max(1) - sizes.min(1)).max() <= 1


@settings(deadline=None)
@given(documents())
def test_work_is_counted_pair_by_pair(case: tuple[list[int], int]) -> None:
    lengths, size = case
    cut = partition(boundaries_of(lengths), size)
    seen_keys = np.concatenate([np.arange(length) + 1 for length in lengths])
    assert cut.pair_work().tolist() == [seen_keys[rows].sum() for rows in cut.rows]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("lengths", [[4096], [1] * 4096, [3] * 4096, [8] * 512, [17] * 4096, [100, 3000, 5, 991] * 4])
def test_work_is_balanced_whatever_the_documents(lengths: list[int], size: int) -> None:
    assert partition(boundaries_of(lengths), size).imbalance() < 1.01


def test_the_rule_in_numbers() -> None:
    """10 over 2 ranks: 2 tokens a piece and one more for each front. Then 3: one for each rank, rank 1's now at its
    back, and one more for rank 0. Then 1, for rank 1."""
    cut = partition(boundaries_of([10, 3, 1]), 2)
    assert cut.pieces.tolist() == [[0, 3, 6, 8, 10], [10, 11, 11, 12, 13], [13, 13, 14, 14, 14]]
    assert cut.rows.tolist() == [[0, 1, 2, 8, 9, 10, 12], [3, 4, 5, 6, 7, 11, 13]]


@settings(deadline=None)
@given(documents())
def test_fronts_and_backs_are_rows_of_the_local_stream(case: tuple[list[int], int]) -> None:
    lengths, size = case
    cut = partition(boundaries_of(lengths), size)
    for rank in range(size):
        for half, piece in ((fronts, rank), (backs, 2 * size - 1 - rank)):
            rows = half(cut.lengths(rank))
            wanted = [range(starts[piece], starts[piece + 1]) for starts in cut.pieces.tolist()]
            assert cut.rows[rank][rows.index].tolist() == [row for document in wanted for row in document]
            assert rows.cu_seqlens.tolist() == [0, *accumulate(map(len, wanted))]


@settings(deadline=None)
@given(documents())
def test_queries_of_a_piece_see_their_document_up_to_its_end(case: tuple[list[int], int]) -> None:
    lengths, size = case
    cut = partition(boundaries_of(lengths), size)
    for rank in range(size):
        visible = prefixes(cut, rank)
        stream = cut.rows.ravel()[visible.index]
        queries = boundaries(cut.lengths(rank).ravel())
        for piece, (start, stop) in enumerate(pairwise(queries)):
            seen = stream[visible.cu_seqlens[piece] : visible.cu_seqlens[piece + 1]].tolist()
            document = int(cut.pieces[piece // 2, 0])
            last = int(cut.rows[rank][stop - 1]) if stop > start else document - 1
            assert seen == list(range(document, last + 1))


@settings(deadline=None)
@given(documents(), st.integers(1, 5))
def test_the_halo_brings_exactly_the_rows_before_each_piece(case: tuple[list[int], int], context: int) -> None:
    lengths, size = case
    cut = partition(boundaries_of(lengths), size)
    halos = [halo(cut, rank, context) for rank in range(size)]
    sent = [np.split(halos[rank].sent, np.cumsum(halos[rank].send_counts)[:-1]) for rank in range(size)]
    for rank in range(size):
        rows = cut.rows[rank]
        received = [cut.rows[other][sent[other][rank]] for other in range(size)]
        assert [len(part) for part in received] == halos[rank].receive_counts
        foreign = np.concatenate(received)
        assert len({*rows.tolist(), *foreign.tolist()}) == len(rows) + len(foreign), "a row came twice or was there"

        stream = np.concatenate((rows, foreign))[halos[rank].stream]
        assert stream[halos[rank].own].tolist() == rows.tolist()
        expected: list[int] = []
        for starts in cut.pieces.tolist():
            for piece in (rank, 2 * size - 1 - rank):
                if starts[piece] < starts[piece + 1]:
                    expected += range(max(starts[0], starts[piece] - context), starts[piece + 1])
        assert stream.tolist() == expected
        assert set(foreign.tolist()) == set(expected) - set(rows.tolist())
        for start, stop in pairwise(halos[rank].cu_seqlens):
            assert np.diff(stream[start:stop]).tolist() == [1] * max(0, stop - start - 1)


def test_a_batch_is_cut_by_rows_and_keeps_its_boundaries() -> None:
    cu_seqlens = boundaries_of([5, 1, 2])
    tokens = torch.arange(8)
    batch = Batch(tokens, tokens + 1, tokens + 2, cu_seqlens, tokens / 2)
    shards = [shard_batch(batch, rank, 2) for rank in range(2)]
    rows = partition(cu_seqlens, 2).rows
    for shard, row in zip(shards, rows, strict=True):
        assert torch.equal(shard.tokens, tokens[row])
        assert torch.equal(shard.labels, tokens[row] + 1)
        assert torch.equal(shard.position_ids, tokens[row] + 2)
        assert shard.loss_weights is not None
        assert torch.equal(shard.loss_weights, tokens[row] / 2)
        assert shard.cu_seqlens is cu_seqlens
    assert shard_batch(batch, 0, 1) is batch


def test_indivisible_tokens_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"parallel.cp 4 does not divide the 7 tokens .* remainder 3"):
        partition(boundaries_of([5, 2]), 4)


def test_a_filter_without_bounds_is_refused_before_any_process_exists() -> None:
    config = load("debug", ["--model.local_filter", "exponential_moving_average", "--model.num_key_value_heads", "4"])
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, cp=2))
    with pytest.raises(ConfigError, match=r"model.local_filter 'exponential_moving_average' .* set parallel.cp to 1"):
        make_layout(config, 2)
