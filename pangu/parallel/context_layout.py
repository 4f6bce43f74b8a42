"""Which tokens a rank holds under context parallelism: arithmetic on document boundaries, no process group.

Every document is cut in 2 x cp consecutive pieces, and rank r holds pieces r, its front, and 2 x cp - 1 - r, its back.
An early piece's queries see few keys and a late one's many, so every rank does the same work inside every document
(Pangu Ultra, section 4, figure 5 (d); cutting the whole stream so would be unbalanced wherever attention is reset).

Padding: there is none. The operators take pieces of any length, 0 included; what must be equal is only the tokens per
rank of the whole stream, because messages have one size. So the pieces of a document differ by at most one token, and
who gets the longer ones rotates: each document's remainder is dealt to ranks in turn, starting where the document
before stopped. A rank that gets one of them adds it to its front and its back by turns, so that no rank always holds
the late tokens of short documents. T tokens divisible by cp then are exactly T / cp tokens on each rank.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pangu.config import ModelConfig
from pangu.data.batch import Batch
from pangu.errors import ConfigError
from pangu.model.local_filter import filter_context

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Partition:
    """`pieces[d, p]` is where piece p of document d starts in the stream, `pieces[d, 2 x cp]` where the document ends.

    A rank's local stream is its rows in their order in the whole stream: front and back of the first document, front
    and back of the second, and so on.
    """

    pieces: Integers  # [N, 2 cp + 1]

    @property
    def size(self) -> int:
        """The number of ranks, cp."""
        return (self.pieces.shape[1] - 1) // 2

    def starts(self, rank: int) -> Integers:
        """Where the rank's fronts and backs start in the stream, `[N, 2]`."""
        return self.pieces[:, [rank, 2 * self.size - 1 - rank]]

    def stops(self, rank: int) -> Integers:
        """Where they end, `[N, 2]`."""
        return self.pieces[:, [rank + 1, 2 * self.size - rank]]

    def lengths(self, rank: int) -> Integers:
        """`[N, 2]`"""
        return self.stops(rank) - self.starts(rank)

    @cached_property
    def rows(self) -> Integers:
        """`[cp, T / cp]`: the places in the stream of every rank's rows."""
        owners = np.minimum(np.arange(2 * self.size), np.arange(2 * self.size)[::-1]).astype(np.int16)
        owner = np.repeat(np.tile(owners, len(self.pieces)), np.diff(self.pieces, axis=1).ravel())
        return owner.argsort(kind="stable").reshape(self.size, -1)

    @cached_property
    def places(self) -> Integers:
        """`[T]`: where the tokens of the stream are when the ranks' local streams are laid end to end."""
        places = np.empty(self.rows.size, np.int64)
        places[self.rows.ravel()] = np.arange(self.rows.size)
        return places

    def pair_work(self) -> Integers:
        """Pairs of a query and a key it sees, per rank `[cp]`: what attention costs."""
        position = self.pieces - self.pieces[:, :1]
        per_piece = np.diff(position * (position + 1) // 2, axis=1).sum(0)  # a query at position p sees p + 1 keys
        work: Integers = per_piece[: self.size] + per_piece[::-1][: self.size]
        return work

    def imbalance(self) -> float:
        """Attention's work on the busiest rank over the mean, 1.0 at best."""
        work = self.pair_work()
        return float(work.max() / work.mean())


def check_context_parallel(model: ModelConfig, size: int) -> None:
    """Raise `ConfigError` where the model has no context-parallel form."""
    if size > 1 and filter_context(model, unbounded=-1) < 0:
        raise ConfigError(
            f"model.local_filter {model.local_filter!r} depends on the whole document before a token, which "
            "parallel.cp spreads over ranks; set parallel.cp to 1"
        )


def partition(cu_seqlens: Tensor, size: int) -> Partition:
    """The cut of the documents in `cu_seqlens`, int32 `[N+1]` on the CPU, over `size` ranks, computed once.

    Its numbers are read also where modes such as FakeTensorMode are active, in which it must still be a real tensor.
    Raises `ConfigError` where `size` does not divide the number of tokens.
    """
    with _disable_current_modes():
        return _partition(cu_seqlens.numpy().astype(np.int64).tobytes(), size)


@lru_cache(maxsize=64)  # every layer and virtual stage asks again for each micro-batch in flight
def _partition(cu_seqlens: bytes, size: int) -> Partition:
    bounds = np.frombuffer(cu_seqlens, np.int64)
    if bounds[-1] % size:
        raise ConfigError(
            f"parallel.cp {size} does not divide the {bounds[-1]} tokens of a micro-batch (train.micro_batch_size x "
            f"sequence_length; remainder {bounds[-1] % size})"
        )
    lengths = np.diff(bounds)
    shortest, remainder = np.divmod(lengths, 2 * size)
    sizes = np.repeat(shortest[:, None], 2 * size, axis=1)
    sizes += _longer_pieces(remainder, size)
    pieces = np.zeros((len(lengths), 2 * size + 1), np.int64)
    np.cumsum(sizes, axis=1, out=pieces[:, 1:])
    return Partition(pieces + bounds[:-1, None])


def _longer_pieces(remainder: Integers, size: int) -> Integers:
    """1 for the pieces that are a token longer than others of their document, `[N, 2 size]`."""
    everyone, rest = np.divmod(remainder, size)
    first = (rest.cumsum() - rest) % size  # the rank at which the rest of a document is dealt first
    turn = (np.arange(size) - first[:, None]) % size
    count = everyone[:, None] + (turn < rest[:, None])  # [N, size]: of the rank's two pieces so many are longer
    single = count == 1
    goes_back = (single.cumsum(0) - single) % 2 == 1
    fronts = (count == 2) | (single & ~goes_back)
    backs = (count == 2) | (single & goes_back)
    return np.concatenate((fronts, backs[:, ::-1]), axis=1).astype(np.int64)


def shard_batch(batch: Batch, rank: int, size: int) -> Batch:
    """The rank's rows of a batch. `cu_seqlens` stays that of the whole: the model's attention and filters want it."""
    if size == 1:
        return batch
    rows = torch.tensor(partition(batch.cu_seqlens, size).rows[rank], device=batch.tokens.device)
    return replace(
        batch,
        tokens=batch.tokens.index_select(0, rows),
        labels=batch.labels.index_select(0, rows),
        position_ids=batch.position_ids.index_select(0, rows),
        loss_weights=None if batch.loss_weights is None else batch.loss_weights.index_select(0, rows),
    )


def ranges(starts: Integers, stops: Integers) -> Integers:
    """The numbers from `starts[i]` up to `stops[i]`, for all i end to end."""
    lengths = stops - starts
    return np.arange(lengths.sum()) + np.repeat(starts - lengths.cumsum() + lengths, lengths)


@dataclass(frozen=True)
class Rows:
    """Some rows of a stream, and the boundaries `[N+1]` of the documents among them."""

    index: Integers
    cu_seqlens: Integers


def fronts(lengths: Integers) -> Rows:
    """The fronts in a local stream of pieces of these lengths `[N, 2]`."""
    return _half(lengths, 0)


def backs(lengths: Integers) -> Rows:
    return _half(lengths, 1)


def _half(lengths: Integers, half: int) -> Rows:
    stops = lengths.ravel().cumsum()[half::2]
    return Rows(ranges(stops - lengths[:, half], stops), boundaries(lengths[:, half]))


def prefixes(partition: Partition, rank: int) -> Rows:
    """What the queries of each piece may see: its document up to the piece's end. Nothing for an empty piece.

    Places among the local streams laid end to end; `cu_seqlens` has one entry per piece of the rank, `[2 N + 1]`.
    """
    starts, stops = partition.starts(rank), partition.stops(rank)
    document = np.broadcast_to(partition.pieces[:, :1], stops.shape)
    document = np.where(starts == stops, stops, document)
    return Rows(partition.places[ranges(document.ravel(), stops.ravel())], boundaries((stops - document).ravel()))


def boundaries(lengths: Integers) -> Integers:
    """Cumulative lengths from 0."""
    return np.concatenate(([0], lengths.cumsum()))


@dataclass(frozen=True)
class Halo:
    """How a rank gets the rows just before its pieces, and the stream of pieces with those rows in front.

    A piece and its context are one document of that stream; the context ends at the document's start, and may come
    from several ranks where pieces are short. Only rows that a rank does not hold are exchanged, each once.
    """

    sent: Integers
    """Local rows that others need, by receiver."""
    send_counts: list[int]
    receive_counts: list[int]
    stream: Integers
    """The stream as places in the own rows followed by the received ones."""
    own: Integers
    """Places of the own rows in the stream."""
    cu_seqlens: Integers


def halo(partition: Partition, rank: int, context: int) -> Halo:
    """The exchange for a filter that looks back `context` tokens."""
    size, num_rows = partition.rows.shape
    needed = [_rows_before(partition, other, context) for other in range(size)]
    received = needed[rank]
    sent = [partition.places[rows[_owner(partition, rows) == rank]] - rank * num_rows for rows in needed]

    starts, stops = partition.starts(rank).ravel(), partition.stops(rank).ravel()
    first = _context_start(partition, rank, context).ravel()
    stream = ranges(first, stops)
    place = partition.places[stream] - rank * num_rows
    order = received.argsort()
    foreign = _owner(partition, stream) != rank
    place[foreign] = num_rows + order[np.searchsorted(received, stream[foreign], sorter=order)]
    in_stream = boundaries(stops - first)
    return Halo(
        sent=np.concatenate(sent),
        send_counts=[len(rows) for rows in sent],
        receive_counts=np.bincount(_owner(partition, received), minlength=size).tolist(),
        stream=place,
        own=ranges(in_stream[1:] - (stops - starts), in_stream[1:]),
        cu_seqlens=in_stream,
    )


def _context_start(partition: Partition, rank: int, context: int) -> Integers:
    """Where the context of each piece starts in the stream, `[N, 2]`; an empty piece has none."""
    starts = partition.starts(rank)
    first = np.maximum(starts - context, partition.pieces[:, :1])
    return np.where(starts == partition.stops(rank), starts, first)


def _rows_before(partition: Partition, rank: int, context: int) -> Integers:
    """The rows of others in the context of a rank's pieces, each once, by owner."""
    rows = np.unique(ranges(_context_start(partition, rank, context).ravel(), partition.starts(rank).ravel()))
    owner = _owner(partition, rows)
    return rows[owner != rank][owner[owner != rank].argsort(kind="stable")]


def _owner(partition: Partition, rows: Integers) -> Integers:
    return partition.places[rows] // partition.rows.shape[1]
