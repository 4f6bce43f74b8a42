"""Attention on the CPU by PyTorch's flash kernel, which takes strided heads and GQA and returns the logsumexp."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pangu_kernels.attention.documents import Run, document_runs
from pangu_kernels.precision import accumulation_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

BLOCK = 256
LONGEST_IN_BLOCKS = 1024
"""Under its causal mask the kernel skips keys in steps of 512 only. Up to this length a call per block of queries with
the keys those may see is faster (512 tokens: 21 ms instead of 31, forward and backward of 8 heads of 64)."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries `start` to `stop` of each document of the run."""

    run: Run
    start: int
    stop: int
    causal: bool

    def queries(self, x: Tensor) -> Tensor:
        return self.run.queries(x).narrow(2, self.start, self.stop - self.start)  # [count, heads, rows, ...]

    def keys(self, x: Tensor) -> Tensor:
        keys = self.run.keys(x)
        return keys.narrow(2, 0, self.run.k_length - self.run.q_length + self.stop) if self.causal else keys

    def mask(self, q: Tensor, k: Tensor) -> dict[str, bool | Tensor]:
        """The kernel's arguments. Its own causal mask aligns top-left, right only for as many queries as keys."""
        if not self.causal:
            return {}
        rows, columns = q.shape[2], k.shape[2]
        if rows == columns:
            return {"is_causal": True}
        if rows == 1:
            return {}
        return {"attn_mask": q.new_full((rows, columns), float("-inf")).triu_(columns - rows + 1)}


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    blocks = _blocks(document_runs(cu_seqlens_q, cu_seqlens_k, q, k, causal), causal)
    results = (_forward_block(block, q, k, v, scale) for block in blocks)
    if _is_all(blocks, q, k):
        out, logsumexp = map(_packed, next(results))
        return out, logsumexp
    out = q.new_zeros(q.shape)
    logsumexp = q.new_full(q.shape[:2], float("-inf"), dtype=accumulation_dtype(q.dtype))
    for block, (block_out, block_logsumexp) in zip(blocks, results, strict=True):
        block.queries(out).copy_(block_out)
        block.queries(logsumexp).copy_(block_logsumexp)
    return out, logsumexp


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _blocks(document_runs(cu_seqlens_q, cu_seqlens_k, q, k, causal), causal)
    results = (_backward_block(block, d_out, q, k, v, out, logsumexp, scale) for block in blocks)
    if _is_all(blocks, q, k):
        d_q, d_k, d_v = map(_packed, next(results))
        return d_q, d_k, d_v
    d_q, d_k, d_v = (x.new_zeros(x.shape) for x in (q, k, v))
    for block, (block_d_q, block_d_k, block_d_v) in zip(blocks, results, strict=True):
        block.queries(d_q).copy_(block_d_q)
        block.keys(d_k).add_(block_d_k)
        block.keys(d_v).add_(block_d_v)
    return d_q, d_k, d_v


def _blocks(runs: list[Run], causal: bool) -> list[_Block]:
    blocks = []
    for run in runs:
        if run.q_length and run.k_length:
            whole = not causal or run.q_length == run.k_length > LONGEST_IN_BLOCKS
            size = run.q_length if whole else BLOCK
            starts = range(0, run.q_length, size)
            blocks += [_Block(run, start, min(start + size, run.q_length), causal) for start in starts]
    return blocks


def _is_all(blocks: list[_Block], q: Tensor, k: Tensor) -> bool:
    """Whether one call computes everything, so that its results need no copy: each query and key is in its run."""
    if len(blocks) != 1:
        return False
    run = blocks[0].run
    return (run.count * run.q_length, run.count * run.k_length) == (len(q), len(k))


def _forward_block(block: _Block, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    block_q, block_k = block.queries(q), block.keys(k)
    out, logsumexp = _flash(block_q, block_k, block.keys(v), scale=scale, **block.mask(block_q, block_k))
    return out, logsumexp


def _backward_block(
    block: _Block, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    block_q, block_k = block.queries(q), block.keys(k)
    arguments = (block.queries(d_out), block_q, block_k, block.keys(v), block.queries(out), block.queries(logsumexp))
    mask = {"is_causal": False, **block.mask(block_q, block_k)}
    d_q, d_k, d_v = _flash_backward(*arguments, dropout_p=0.0, scale=scale, **mask)
    return d_q, d_k, d_v


def _packed(x: Tensor) -> Tensor:
    """`[count, heads, rows, ...]` as `[count * rows, heads, ...]`: as the kernel lays its results out already."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()
