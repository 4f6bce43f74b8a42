"""Embedding, head and loss over a vocabulary dealt over the ranks of a group: logits are neither whole nor gathered."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from pangu_kernels import embedding
from pangu_kernels.linear_cross_entropy import reference
from torch import Tensor
from torch.nn import functional as F

from pangu.model import Transformer

Communicate = Callable[[Tensor], Tensor]


def apply_vocabulary_parallel(
    model: Transformer, group: dist.ProcessGroup, gather: Communicate, reduce: Communicate
) -> None:
    """Give `model`, whose embedding and head weights are shards of the vocabulary, functions that go with them.

    gather: from the residual stream's share to all tokens; reduce: from parts of a sum to the residual stream's share.
    """
    if model.embedding is not None:
        model.embedding.look_up = partial(_look_up, group=group, reduce=reduce)
    model.head_loss = partial(_head_loss, group=group, gather=gather)
    model.project_to_vocabulary = partial(_project_to_vocabulary, group=group, gather=gather)


def _look_up(
    tokens: Tensor, weight: Tensor, dtype: torch.dtype, *, group: dist.ProcessGroup, reduce: Communicate
) -> Tensor:
    """`pangu.model.transformer.look_up`: every row comes from the one rank that has it."""
    shard_tokens = tokens - group.rank() * len(weight)
    outside = (shard_tokens < 0) | (shard_tokens >= len(weight))
    rows = embedding(shard_tokens.masked_fill(outside, 0), weight).to(dtype)
    return reduce(rows.masked_fill(outside.unsqueeze(-1), 0))


def _head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None,
    *,
    group: dist.ProcessGroup,
    gather: Communicate,
) -> tuple[Tensor, Tensor]:
    """`pangu_kernels.linear_cross_entropy` of all tokens, the same on every rank."""
    loss: tuple[Tensor, Tensor] = ShardedLinearCrossEntropy.apply(gather(hidden), weight, labels, loss_weights, group)
    return loss


def _project_to_vocabulary(hidden: Tensor, weight: Tensor, *, group: dist.ProcessGroup, gather: Communicate) -> Tensor:
    """Logits of all tokens over the whole vocabulary, for sampling: a few rows at a time."""
    shard = F.linear(gather(hidden), weight.to(hidden.dtype))
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


class ShardedLinearCrossEntropy(torch.autograd.Function):
    """x `[T, H]`, weight `[V/t, H]`: loss sum and token losses, as `pangu_kernels.linear_cross_entropy`.

    Per chunk of tokens two reductions of a few numbers per token cross the group; the gradient of x is this rank's part
    of a sum, which the backward of `gather` completes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        x_needs, weight_needs = ctx.needs_input_grad[:2]
        loss_sum, token_loss, d_x, d_weight = reference.forward(
            x,
            weight,
            labels,
            loss_weights,
            0,
            x_needs,
            weight_needs,
            loss_and_gradient_=partial(sharded_cross_entropy_, group=group),
            vocab_size=len(weight) * group.size(),
        )
        ctx.save_for_backward(d_x, d_weight)
        ctx.mark_non_differentiable(token_loss)
        ctx.set_materialize_grads(False)
        return loss_sum, token_loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, d_token_loss: None) -> tuple[Tensor | None, ...]:
        if d_loss is None:
            return None, None, None, None, None
        d_x, d_weight = ctx.saved_tensors
        reference.backward(d_loss, d_x, d_weight)
        x_needs, weight_needs = ctx.needs_input_grad[:2]
        return d_x if x_needs else None, d_weight if weight_needs else None, None, None, None


def sharded_cross_entropy_(
    logits: Tensor, labels: Tensor, token_weights: Tensor, needs_grad: bool, *, group: dist.ProcessGroup
) -> Tensor:
    """Losses `[C]` of this rank's columns `[C, V/t]` of the logits, which become this rank's part of the gradient."""
    shard_labels = labels - group.rank() * logits.shape[1]
    mine = (shard_labels >= 0) & (shard_labels < logits.shape[1])
    present = shard_labels.masked_fill(~mine, 0)
    maximum = logits.amax(-1)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    logits.sub_(maximum.unsqueeze(1))
    label_logit = logits.gather(1, present.unsqueeze(1)).squeeze(1).masked_fill(~mine, 0)
    total, label_logit = _sum_over(group, logits.exp_().sum(-1), label_logit)
    if needs_grad:
        logits.mul_((token_weights / total).unsqueeze(1))
        logits.scatter_add_(1, present.unsqueeze(1), (-token_weights).masked_fill(~mine, 0).unsqueeze(1))
    return (total.log() - label_logit).masked_fill_(labels == reference.IGNORED, 0)


def _sum_over(group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    stacked = torch.stack(tensors)
    dist.all_reduce(stacked, group=group)
    return stacked.unbind()
