"""Context parallelism: the tokens of every document are spread over ranks (`context_layout` says how).

Most of the model works token by token and does not notice. Attention meets the keys of other ranks in one of two ways:

ring        Keys and values travel around the ranks; each block is attended to while the next is on its way (Liu et al.
            2023). Of an earlier rank's block all queries see the fronts; of a later rank's block only the backs'
            queries see anything, and see all of it. Parts are merged in fp32 by their logsumexp. In the backward pass
            the gradient of a block travels one step behind it and collects what every rank adds. Bytes a rank sends:
            cp - 1 blocks of keys and values forward, as many backward, and cp - 1 fp32 blocks of gradients.
all_gather  Keys and values are gathered once, and again in the backward pass instead of being kept; the queries of a
            piece see the start of their document up to the piece's end. Gradients are reduce-scattered in fp32.

A filter that looks a few tokens back gets the rows before each piece from the ranks that hold them (`with_halo`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from pangu_kernels.precision import accumulation_dtype, widen
from torch import Tensor

from pangu.errors import ConfigError
from pangu.model.local_filter import Convolution, TwoConvolutions, filter_context
from pangu.model.transformer import Block, Transformer
from pangu.parallel import context_layout
from pangu.parallel.context_layout import Integers, Partition, check_context_parallel, partition

Exchange = Literal["ring", "all_gather"]

_PLANS = 64  # more than the micro-batches in flight

_attention = torch.ops.pangu.attention.default
_attention_backward = torch.ops.pangu.attention_backward.default


def apply_context_parallel(model: Transformer, group: dist.ProcessGroup, exchange: Exchange) -> None:
    """Let the layers of `model` work on one rank's share of a batch (`context_layout.shard_batch`).

    Attention and local filters then communicate within `group`; `cu_seqlens` is still that of the whole batch. Raises
    `ConfigError` for a filter that looks back without bound.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return
    check_context_parallel(model.config, size)
    context = ContextParallel(group, exchange)
    look_back = filter_context(model.config)
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.attention.core_attention = context.attention
        local_filter = block.attention.local_filter
        if isinstance(local_filter, TwoConvolutions | Convolution):
            local_filter.convolve = context.with_halo(local_filter.convolve, look_back)


class ContextParallel:
    """What the layers of a rank share: the group, and plans that are made once for the documents of a micro-batch."""

    def __init__(self, group: dist.ProcessGroup, exchange: Exchange) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.exchange = exchange
        self._ring_plan = lru_cache(_PLANS)(_RingPlan.make)
        self._gather_plan = lru_cache(_PLANS)(_GatherPlan.make)
        self._halo_plan = lru_cache(_PLANS)(_HaloPlan.make)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`pangu_kernels.attention` of the rank's rows of q, k and v `[T / cp, heads, head_dim]`.

        cu_seqlens is that of all T tokens. Out `[T / cp, heads, head_dim]` and logsumexp `[T / cp, heads]` are of the
        rank's rows.
        """
        if cu_seqlens_k is not cu_seqlens_q:
            raise ConfigError("generation with a cache has no context-parallel form; set parallel.cp to 1")
        cut = partition(cu_seqlens_q, self.size)
        if self.exchange == "ring":
            return _RingAttention.apply(q, k, v, self._ring_plan(cut, self.rank, q.device), scale, self.group)
        return _GatherAttention.apply(q, k, v, self._gather_plan(cut, self.rank, q.device), scale, self.group)

    def with_halo(self, convolve: Callable[..., Tensor], look_back: int) -> Callable[..., Tensor]:
        """`convolve(x, *weights, cu_seqlens)`, whose rows depend on up to `look_back` rows before them, on shares.

        The result takes the rank's rows of x `[T / cp, H]` and the cu_seqlens of all T tokens.
        """

        def convolve_share(x: Tensor, *arguments: Tensor) -> Tensor:
            *weights, cu_seqlens = arguments
            plan = self._halo_plan(partition(cu_seqlens, self.size), self.rank, look_back, x.device)
            received = _ExchangeRows.apply(x, plan, self.group)
            stream = torch.cat((x, received)).index_select(0, plan.stream)
            return convolve(stream, *weights, plan.cu_seqlens).index_select(0, plan.own)

        return convolve_share


# ---- ring


@dataclass(frozen=True)
class _Rows:
    """Rows of a stream, int64 on the device, and the boundaries of the documents among them, int32 on the CPU."""

    index: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, rows: context_layout.Rows, device: torch.device) -> "_Rows":
        return cls(_index(rows.index, device), _boundaries(rows.cu_seqlens))


@dataclass(frozen=True)
class _RingPlan:
    local: Tensor
    """Boundaries of the rank's own stream."""
    backs: _Rows
    earlier: list[_Rows]
    """The fronts of the ranks before, in the order in which their blocks come: the nearest first."""
    later: list[Tensor]
    """Boundaries in the streams of the ranks behind, in the order in which their blocks come: the last rank's first."""

    @classmethod
    def make(cls, cut: Partition, rank: int, device: torch.device) -> "_RingPlan":
        streams = [_boundaries(context_layout.boundaries(cut.lengths(other).sum(1))) for other in range(cut.size)]
        return cls(
            local=streams[rank],
            backs=_Rows.of(context_layout.backs(cut.lengths(rank)), device),
            earlier=[_Rows.of(context_layout.fronts(cut.lengths(other)), device) for other in reversed(range(rank))],
            later=streams[:rank:-1],
        )


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _RingPlan, scale: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(k, v, group)
        out, logsumexp = _attention(q, k, v, plan.local, plan.local, scale, True)
        out = widen(out)
        for rows in plan.earlier:
            kv = blocks.next()
            if len(rows.index):
                block_k, block_v = kv.index_select(0, rows.index).unbind(1)
                part = _attention(q, block_k, block_v, plan.local, rows.cu_seqlens, scale, False)
                _merge(out, logsumexp, *part)
        if plan.later:
            index = plan.backs.index
            q_back, out_back, logsumexp_back = (x.index_select(0, index) for x in (q, out, logsumexp))
            for cu_seqlens in plan.later:
                kv = blocks.next()
                if len(index):
                    part = _attention(q_back, *kv.unbind(1), plan.backs.cu_seqlens, cu_seqlens, scale, False)
                    _merge(out_back, logsumexp_back, *part)
            out.index_copy_(0, index, out_back)
            logsumexp.index_copy_(0, index, logsumexp_back)
        out = out.to(q.dtype)
        _save(ctx, (q, k, v, out, logsumexp), plan, scale, group)
        return out, logsumexp

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_logsumexp: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 6
        plan, scale, group = ctx.plan, ctx.scale, ctx.group
        d_out = d_out.contiguous()
        q, k, v, out, logsumexp = ctx.saved_tensors
        blocks, gradients = _Blocks(k, v, group), _BlockGradients(group)
        d_q, *d_kv = _attention_backward(d_out, q, k, v, out, logsumexp, plan.local, plan.local, scale, True)
        d_q, d_kv = widen(d_q), widen(torch.stack(d_kv, 1))
        for rows in plan.earlier:
            kv = blocks.next()
            d_block = torch.zeros_like(d_kv)
            if len(rows.index):
                keys = kv.index_select(0, rows.index).unbind(1)
                boundaries = (plan.local, rows.cu_seqlens)
                part, *d_keys = _attention_backward(d_out, q, *keys, out, logsumexp, *boundaries, scale, False)
                d_q += part
                d_block.index_copy_(0, rows.index, widen(torch.stack(d_keys, 1)))
            gradients.send_on(d_block)
        if plan.later:
            index = plan.backs.index
            queries = [x.index_select(0, index) for x in (d_out, q, out, logsumexp)]
            d_q_back = d_q.index_select(0, index)
            for cu_seqlens in plan.later:
                kv = blocks.next()
                d_block = torch.zeros_like(d_kv)
                if len(index):
                    boundaries = (plan.backs.cu_seqlens, cu_seqlens)
                    part, *d_keys = _attention_backward(
                        *queries[:2], *kv.unbind(1), *queries[2:], *boundaries, scale, False
                    )
                    d_q_back += part
                    d_block = widen(torch.stack(d_keys, 1))
                gradients.send_on(d_block)
            d_q.index_copy_(0, index, d_q_back)
        d_kv += gradients.own()
        return d_q.to(q.dtype), *d_kv.to(k.dtype).unbind(1), None, None, None


def _merge(out: Tensor, logsumexp: Tensor, part_out: Tensor, part_logsumexp: Tensor) -> None:
    """Add attention over other keys, in place. `logsumexp` is finite: a query has seen itself."""
    share = torch.sigmoid(part_logsumexp - logsumexp).unsqueeze(-1)
    out.lerp_(part_out.to(out.dtype), share)
    torch.logaddexp(logsumexp, part_logsumexp, out=logsumexp)


class _Shift:
    """A tensor on its way to the next rank while that of the rank before is on its way here."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup, tag: int) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._sent = sent  # must live until it is sent
        self._received = torch.empty_like(sent)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=group, tag=tag, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, self._received, group=group, tag=tag, group_peer=(rank - 1) % size),
            ]
        )

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received


class _Blocks:
    """Keys and values `[T / cp, 2, heads, head_dim]` of the other ranks: of the one before, the one before that ..."""

    def __init__(self, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> None:
        self._group = group
        self._following = dist.get_world_size(group) - 2  # blocks to come after the one in flight
        self._in_flight = _Shift(torch.stack((k, v), 1), group, tag=0)

    def next(self) -> Tensor:
        """The next block. The one after it is on its way already when this returns."""
        block = self._in_flight.wait()
        if self._following:
            self._following -= 1
            self._in_flight = _Shift(block, self._group, tag=0)
        return block


class _BlockGradients:
    """Gradients of blocks, each of which follows its block from rank to rank and in the end comes home."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._in_flight: _Shift | None = None

    def send_on(self, d_block: Tensor) -> None:
        """Add what the ranks before have added for this block, and send it to the next."""
        if self._in_flight is not None:
            d_block += self._in_flight.wait()
        self._in_flight = _Shift(d_block, self._group, tag=1)

    def own(self) -> Tensor:
        """What all others have added for this rank's block."""
        assert self._in_flight is not None
        return self._in_flight.wait()


# ---- all-gather


@dataclass(frozen=True)
class _GatherPlan:
    pieces: Tensor
    """Boundaries of the rank's pieces, fronts and backs, in its stream: each is a document of queries."""
    visible: _Rows
    """What each of them sees, among the gathered keys."""

    @classmethod
    def make(cls, cut: Partition, rank: int, device: torch.device) -> "_GatherPlan":
        pieces = _boundaries(context_layout.boundaries(cut.lengths(rank).ravel()))
        return cls(pieces, _Rows.of(context_layout.prefixes(cut, rank), device))


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _GatherPlan, scale: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        keys = _gather(k, v, group).index_select(0, plan.visible.index).unbind(1)
        out, logsumexp = _attention(q, *keys, plan.pieces, plan.visible.cu_seqlens, scale, True)
        _save(ctx, (q, k, v, out, logsumexp), plan, scale, group)
        return out, logsumexp

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_logsumexp: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 6
        plan, scale, group = ctx.plan, ctx.scale, ctx.group
        q, k, v, out, logsumexp = ctx.saved_tensors
        gathered = _gather(k, v, group)
        keys = gathered.index_select(0, plan.visible.index).unbind(1)
        boundaries = (plan.pieces, plan.visible.cu_seqlens)
        d_q, *d_keys = _attention_backward(d_out.contiguous(), q, *keys, out, logsumexp, *boundaries, scale, True)
        d_gathered = gathered.new_zeros(gathered.shape, dtype=accumulation_dtype(k.dtype))
        d_gathered.index_add_(0, plan.visible.index, widen(torch.stack(d_keys, 1)))
        d_kv = d_gathered.new_empty((len(k), *d_gathered.shape[1:]))
        dist.reduce_scatter_single(d_kv, d_gathered, group=group)
        return d_q, *d_kv.to(k.dtype).unbind(1), None, None, None


def _gather(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Keys and values of all ranks, `[T, 2, heads, head_dim]`."""
    kv = torch.stack((k, v), 1)
    gathered = kv.new_empty((dist.get_world_size(group) * len(kv), *kv.shape[1:]))
    dist.all_gather_single(gathered, kv, group=group)
    return gathered


# ---- halo


@dataclass(frozen=True)
class _HaloPlan:
    """`context_layout.Halo` with its indices on the device."""

    sent: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    stream: Tensor
    own: Tensor
    cu_seqlens: Tensor

    @classmethod
    def make(cls, cut: Partition, rank: int, look_back: int, device: torch.device) -> "_HaloPlan":
        halo = context_layout.halo(cut, rank, look_back)
        sent, stream, own = (_index(places, device) for places in (halo.sent, halo.stream, halo.own))
        return cls(sent, halo.send_counts, halo.receive_counts, stream, own, _boundaries(halo.cu_seqlens))


class _ExchangeRows(torch.autograd.Function):
    """The rows `[received, H]` that a rank needs of others' x `[T / cp, H]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _HaloPlan, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group, ctx.num_rows = plan, group, len(x)
        received = x.new_empty((sum(plan.receive_counts), x.shape[1]))
        sent = x.index_select(0, plan.sent)
        dist.all_to_all_single(received, sent, plan.receive_counts, plan.send_counts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, d_received: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        d_sent = d_received.new_empty((len(plan.sent), d_received.shape[1]))
        counts = (plan.send_counts, plan.receive_counts)
        dist.all_to_all_single(d_sent, d_received.contiguous(), *counts, group=ctx.group)
        d_x = d_sent.new_zeros((ctx.num_rows, d_sent.shape[1]))
        return d_x.index_add_(0, plan.sent, d_sent), None, None


def _save(
    ctx: Any,
    tensors: tuple[Tensor, ...],
    plan: _RingPlan | _GatherPlan,
    scale: float,
    group: dist.ProcessGroup,
) -> None:
    ctx.plan, ctx.scale, ctx.group = plan, scale, group
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(tensors[-1])
    ctx.save_for_backward(*tensors)


def _index(rows: Integers, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _boundaries(cu_seqlens: Integers) -> Tensor:
    return torch.tensor(cu_seqlens, dtype=torch.int32, device="cpu")
