"""What generation remembers of the tokens before: keys, values, and the inputs that a local filter looks back on.

Sequences of any length share flat buffers of one row per token. Before each forward pass `Cache.advance` works out on
the host, once for all layers, which rows are read and written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Cache:
    """State of `len(capacities)` sequences, of up to so many tokens each.

    filter_context is how many inputs before its own a filtered token depends on (0: no filter); only so many are kept,
    which for LFA is Yuan's two-token cache. Buffers take the shape of what a layer first writes, so that a part of a
    model caches its own layers and heads.
    """

    def __init__(self, capacities: Sequence[int], filter_context: int, device: torch.device) -> None:
        self.device = device
        self.lengths = torch.zeros(len(capacities), dtype=torch.int64)
        self.slots = _Slots(torch.tensor(capacities, dtype=torch.int64))
        self.context_slots = _Slots(self.slots.widths.clamp(max=filter_context))
        self._layers: dict[str, LayerCache] = {}

    def layer(self, index: str) -> "LayerCache":
        return self._layers.setdefault(index, LayerCache(self))

    def advance(self, sequences: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Prepare for a forward pass over `counts[i]` new tokens of each of `sequences`, laid end to end.

        Returns their position_ids, int64 `[T]` on the device, and cu_seqlens, int32 `[N+1]` on the CPU. Raises
        ValueError where a sequence would outgrow its capacity.
        """
        live = torch.tensor(sequences, dtype=torch.int64)
        start = self.lengths[live]
        stop = start + torch.tensor(counts, dtype=torch.int64)
        if (stop > self.slots.widths[live]).any():
            raise ValueError(f"sequences of {stop.tolist()} tokens outgrow {self.slots.widths[live].tolist()} rows")
        self.lengths[live] = stop
        self.attention_rows = _attention_rows(self.slots, live, start, stop, self.device)
        self.filter_rows = _filter_rows(self.context_slots, live, start, stop, self.device)
        return _ranges(start, stop)[1].to(self.device), _boundaries(stop - start)


class LayerCache:
    """The buffers of one layer. Every call is about the tokens that `Cache.advance` announced."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._buffers: dict[str, Tensor] = {}

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store k and v `[T, heads, head_dim]` of the new tokens; return those of all tokens so far and boundaries."""
        rows, slots = self._cache.attention_rows, self._cache.slots
        keys, values = self._buffer("keys", k, slots), self._buffer("values", v, slots)
        keys[rows.written], values[rows.written] = k, v
        return keys[rows.visible], values[rows.visible], rows.cu_seqlens

    def with_context(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `[T, H]` of the new tokens, each sequence's preceded by what its filter looks back on, with boundaries."""
        rows = self._cache.filter_rows
        inputs = self._buffer("inputs", x, self._cache.context_slots)
        stream = torch.cat((inputs[rows.context], x))[rows.order]
        inputs[rows.kept] = stream[rows.kept_in_stream]
        return stream, rows.cu_seqlens

    def without_context(self, stream: Tensor) -> Tensor:
        """The rows of the new tokens, `[T, H]`."""
        return stream[self._cache.filter_rows.new_in_stream]

    def _buffer(self, name: str, like: Tensor, slots: "_Slots") -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = like.new_zeros(slots.total, *like.shape[1:])
        return self._buffers[name]


class _Slots:
    """Rows of a buffer, `widths[i]` of them sequence i's, used as a ring: position p has row p mod width."""

    def __init__(self, widths: Tensor) -> None:
        self.widths = widths
        self.offsets = widths.cumsum(0) - widths
        self.total = int(widths.sum())

    def rows(self, sequences: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Rows of positions `start[i]` to `stop[i]` of `sequences[i]`, end to end."""
        owner, position = _ranges(start, stop)
        sequence = sequences[owner]
        return self.offsets[sequence] + position % self.widths[sequence]


@dataclass(frozen=True)
class _AttentionRows:
    cu_seqlens: Tensor
    written: Tensor
    """`[T]` rows for the new tokens."""
    visible: Tensor
    """Rows of all tokens of the live sequences, old and new."""


def _attention_rows(slots: _Slots, live: Tensor, start: Tensor, stop: Tensor, device: torch.device) -> _AttentionRows:
    return _AttentionRows(
        cu_seqlens=_boundaries(stop),
        written=slots.rows(live, start, stop).to(device),
        visible=slots.rows(live, torch.zeros_like(stop), stop).to(device),
    )


@dataclass(frozen=True)
class _FilterRows:
    """The filter's stream: of each sequence its context, then its new tokens."""

    cu_seqlens: Tensor
    context: Tensor
    """Rows of the context."""
    order: Tensor
    """The stream as places in all context followed by all new tokens."""
    new_in_stream: Tensor
    """`[T]` places of the new tokens."""
    kept_in_stream: Tensor
    """Places of what is context in the next step."""
    kept: Tensor
    """Rows for it."""


def _filter_rows(slots: _Slots, live: Tensor, start: Tensor, stop: Tensor, device: torch.device) -> _FilterRows:
    context = slots.widths[live].minimum(start)
    kept = slots.widths[live].minimum(stop)
    lengths = context + stop - start
    owner, place = _ranges(torch.zeros_like(lengths), lengths)
    is_new = place >= context[owner]
    ends = lengths.cumsum(0)
    return _FilterRows(
        cu_seqlens=_boundaries(lengths),
        context=slots.rows(live, start - context, start).to(device),
        order=is_new.argsort(stable=True).argsort().to(device),
        new_in_stream=is_new.nonzero().flatten().to(device),
        kept_in_stream=_ranges(ends - kept, ends)[1].to(device),
        kept=slots.rows(live, stop - kept, stop).to(device),
    )


def _ranges(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers from `start[i]` up to `stop[i]`, for all i end to end: the i of each, and the numbers."""
    lengths = stop - start
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    first = lengths.cumsum(0) - lengths
    return owner, torch.arange(len(owner)) + (start - first)[owner]


def _boundaries(lengths: Tensor) -> Tensor:
    """Cumulative lengths from 0, int32 `[N+1]` on the CPU."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
