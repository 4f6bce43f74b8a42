"""Floating-point operations of an operator and bytes that a collective sends, from its arguments alone."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

ATTENTION_BACKWARD = 2.5
"""FLOPs of fused attention's backward relative to forward: five products instead of two. Counts of model FLOPs have 2,
as if the scores had been kept."""

_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
"""Operators that PyTorch has no formula for, and those that compute the same."""

_GATHERS = ("allgather_", "_allgather_base_", "all_gather_into_tensor", "allgather_into_tensor_coalesced_")
_SCATTERS = ("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced_")
_REDUCTIONS = ("allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_")
_EXCHANGES = ("alltoall_base_", "all_to_all_single")


def flops(operator: Any, args: Any, kwargs: Any, result: Any) -> tuple[str, float]:
    """What kind of operation ("matmul" or "attention") and how many FLOPs: two for a multiplication and addition.

    Matrix-vector products and element-wise operations count as none.
    """
    ours = _PANGU.get(operator.name())
    if ours is not None:
        return ours(*args, **kwargs)
    formula = flop_registry.get(_IN_PLACE.get(operator.overloadpacket, operator.overloadpacket))
    return ("matmul", 0) if formula is None else ("matmul", formula(*args, **kwargs, out_val=result))


def visible_pairs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> float:
    """Pairs of query and key that attention computes; of a causal document half the square, as MFU counts."""
    pairs = 0.0
    for (q_start, q_stop), (k_start, k_stop) in zip(
        pairwise(_values(cu_seqlens_q)), pairwise(_values(cu_seqlens_k)), strict=True
    ):
        queries, keys = q_stop - q_start, k_stop - k_start
        pairs += queries * (keys - queries / 2 if causal else keys)
    return pairs


def _values(host: Tensor) -> list[int]:
    with _disable_current_modes():
        values: list[int] = host.tolist()
    return values


def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool = True
) -> tuple[str, float]:
    return "attention", 4 * visible_pairs(cu_seqlens_q, cu_seqlens_k, causal) * q.shape[1] * q.shape[2]


def _attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, *rest: Any
) -> tuple[str, float]:
    kind, forward = _attention(q, k, v, *rest)
    return kind, ATTENTION_BACKWARD * forward


def _weight_gradient(d_y: Tensor, x: Tensor, *rest: Any) -> tuple[str, float]:
    return "matmul", 2 * d_y.numel() * x.shape[1]


def _local_filter(x: Tensor, weight1: Tensor, *rest: Any) -> tuple[str, float]:
    return "matmul", 4 * len(x) * weight1.numel()  # both convolutions have weights of this size


_PANGU: dict[str, Callable[..., tuple[str, float]]] = {
    "pangu::attention": _attention,
    "pangu::attention_backward": _attention_backward,
    "pangu::weight_gradient": _weight_gradient,
    "pangu::add_weight_gradient": lambda accumulator, *operands: _weight_gradient(*operands),
    "pangu::local_filter": _local_filter,
    "pangu::local_filter_backward": lambda d_y, x, hidden, weight1, *rest: (
        "matmul",
        2 * _local_filter(x, weight1)[1],
    ),
}


def collective(operator: Any, args: Any, result: Any) -> tuple[str, str, int] | None:
    """Name of the group, name of the collective and bytes that this rank sends; None for what is none.

    Collectives travel in a ring: of n ranks each sends (n - 1) / n of what is gathered or reduced, twice that in an
    all-reduce. Of a broadcast every rank but the last in the ring sends everything: (n - 1) / n is the mean.
    """
    name = operator.overloadpacket.__name__
    if name in ("wait_tensor", "barrier", "monitored_barrier_"):
        return None
    group = _group(args)
    size = group.size()
    if name in _GATHERS:
        whole = result if operator.namespace == "_c10d_functional" else args[0]
        return group.group_name, "all-gather", _bytes(whole) * (size - 1) // size
    if name in _SCATTERS:
        whole = args[0] if operator.namespace == "_c10d_functional" else args[1]
        return group.group_name, "reduce-scatter", _bytes(whole) * (size - 1) // size
    if name in _REDUCTIONS:
        return group.group_name, "all-reduce", 2 * _bytes(args[0]) * (size - 1) // size
    if name in _EXCHANGES:
        return group.group_name, "all-to-all", _exchanged(args[1], args[4], group)
    if name == "broadcast_":
        return group.group_name, "broadcast", _bytes(args[0]) * (size - 1) // size
    if name == "send":
        return group.group_name, "send", _bytes(args[0])
    if name.startswith("recv"):
        return group.group_name, "receive", 0
    raise NotImplementedError(f"no count of bytes for the collective {operator.name()}")


def _group(args: Any) -> dist.ProcessGroup:
    for argument in reversed(args):
        if isinstance(argument, str):
            return _resolve_process_group(GroupName(argument))
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument)
    raise NotImplementedError("a collective without a process group")


def _exchanged(sent: Tensor, splits: list[int], group: dist.ProcessGroup) -> int:
    rows = splits or [len(sent) // group.size()] * group.size()
    return (sum(rows) - rows[group.rank()]) * sent[:1].numel() * sent.element_size()


def _bytes(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tree_iter(tensors) if isinstance(each, Tensor))
