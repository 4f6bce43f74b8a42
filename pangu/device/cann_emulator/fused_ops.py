"""What torch_npu's own operators compute, in plain PyTorch, by the formulas that their documentation gives.

The functions see CPU tensors over the device's memory, compute in fp32, and take an operator's arguments by the names
in its schema, as far as they support them; registration.py refuses the others. What aclnn documents as unsupported and
torch_npu's host code lets through is refused here.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UNLIMITED = 2**31 - 1  # pre_tokens and next_tokens of a band without edges
MASK_TEMPLATE = (2048, 2048)  # of the sparse modes that build their mask themselves

Ends = Sequence[int] | Tensor | None  # where each sequence ends, counted from the start of the batch


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"{message} (documented limit, checked by aclnn on a device)")


# ---- normalization and activation


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    dims = _normalized_dims(input, gamma)
    x = input.float()
    rstd = torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)
    return x * rstd * gamma.float(), rstd


def rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dims = _normalized_dims(input, gamma)
    normalized, scaled = input.float() * rstd, dy.float() * gamma.float()
    dx = rstd * (scaled - normalized * (scaled * normalized).mean(dims, keepdim=True))
    dgamma = (dy.float() * normalized).sum_to_size(gamma.shape)
    return dx, dgamma


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    _require(gamma.dtype == x1.dtype == x2.dtype, "add_rms_norm: x1, x2 and gamma differ in dtype")
    _require(x1.numel() > 0, "add_rms_norm: an empty tensor")
    total = (x1.float() + x2.float()).to(x1.dtype)
    return *rms_norm(total, gamma, epsilon), total


def _normalized_dims(input: Tensor, gamma: Tensor) -> tuple[int, ...]:
    _require(input.shape[input.dim() - gamma.dim() :] == gamma.shape, "rms_norm: gamma is not of the last dimensions")
    _require(gamma.dtype in (input.dtype, torch.float32), "rms_norm: gamma is neither fp32 nor of the input's dtype")
    return tuple(range(-gamma.dim(), 0))


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.float().chunk(2, dim)
    return F.silu(gate) * up


def swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.float().chunk(2, dim)
    grad, sigmoid = grad_output.float(), gate.sigmoid()
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, grad * gate * sigmoid], dim)


# ---- rotary embedding


def rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    _require(input.shape[-1] % 2 == 0 and input.shape[-1] < 896, "rotary_mul: the last dimension is odd or over 895")
    return input.float() * r1.float() + _rotate(input.float(), rotary_mode) * r2.float()


def rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x = grad.float(), input.float()
    dx = dy * r1.float() - _rotate(dy * r2.float(), rotary_mode)  # the rotation's transpose is its negative
    return dx, (dy * x).sum_to_size(r1.shape), (dy * _rotate(x, rotary_mode)).sum_to_size(r2.shape)


def _rotate(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


# ---- attention


@dataclass(frozen=True)
class Layout:
    """Finds the sequences of a batch in tensors of one input_layout."""

    name: str
    head_num: int
    query_ends: Ends
    key_ends: Ends
    softmax_layout: str

    def queries(self, tensor: Tensor) -> list[Tensor]:
        """Views [heads, length, head_dim], one for each sequence."""
        return self._sequences(tensor, self.name, self.query_ends)

    def keys(self, tensor: Tensor, query: Tensor) -> list[Tensor]:
        if self.name in ("BSH", "SBH"):  # whose heads are told apart by the size that they have in query
            tensor = tensor.unflatten(-1, (-1, query.shape[-1] // self.head_num))
            return self._sequences(tensor, {"BSH": "BSND", "SBH": "SBND"}[self.name], None)
        return self._sequences(tensor, self.name, self.key_ends)

    def statistics(self, tensor: Tensor) -> list[Tensor]:
        """Of softmax_max and softmax_sum, which repeat every number 8 times: views [heads, length, 1].

        In TND they have the shape [tokens, heads, 8], but not the order unless softmax_layout says so: the numbers of
        each sequence lie [heads, length, 8], as documented.
        """
        if self.name != "TND":
            views = self._sequences(tensor, "BNSD", None)
        elif self.softmax_layout == "TND":
            views = self._sequences(tensor, "TND", self.query_ends)
        else:
            rows = [view.transpose(0, 1) for view in self._sequences(tensor, "TND", self.query_ends)]
            views = [block.view(block.shape[1], block.shape[0], 8) for block in rows]
        return [view[..., :1] for view in views]

    def new_statistics(self, query: Tensor) -> Tensor:
        if self.name == "TND":
            return torch.empty(*query.shape[:2], 8)
        first = self.queries(query)
        return torch.empty(len(first), *first[0].shape[:2], 8)

    def _sequences(self, tensor: Tensor, layout: str, ends: Ends) -> list[Tensor]:
        if layout == "TND":
            stops = [int(end) for end in ends] if ends is not None else []
            _require(stops[-1:] == [len(tensor)], f"TND: the last of actual_seq_len, {stops}, is not {len(tensor)}")
            return [tensor[i:j].transpose(0, 1) for i, j in zip([0, *stops], stops, strict=False)]
        if layout in ("BSH", "SBH"):
            return self._sequences(tensor.unflatten(-1, (self.head_num, -1)), layout.replace("H", "ND"), None)
        return list(tensor.permute([layout.index(dim) for dim in "BNSD"]).unbind())


def fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    actual_seq_qlen: Ends = None,
    actual_seq_kvlen: Ends = None,
    sparse_mode: int = 0,
    softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output and, repeated 8 times in a last dimension, each row's largest score and sum of exps."""
    _check_attention(query, key, value, input_layout, actual_seq_qlen)
    layout = Layout(input_layout, head_num, actual_seq_qlen, actual_seq_kvlen, softmax_layout)
    output, maximum, total = torch.empty(query.shape), layout.new_statistics(query), layout.new_statistics(query)
    sequences = zip(
        *map(layout.queries, (query, output)),
        *(layout.keys(tensor, query) for tensor in (key, value)),
        *map(layout.statistics, (maximum, total)),
        strict=True,
    )
    for q, out, k, v, row_maximum, row_total in sequences:
        if not q.shape[1]:
            continue
        _require(k.shape[1] > 0, "fusion_attention: a sequence has queries and no keys")
        masked = _masked(q.shape[1], k.shape[1], atten_mask, sparse_mode, pre_tockens, next_tockens)
        scores = _scores(q, k, scale, masked)  # [heads, q, kv]
        row_maximum.copy_(scores.amax(-1, keepdim=True))
        exponentials = (scores - row_maximum).exp()
        row_total.copy_(exponentials.sum(-1, keepdim=True))
        out.copy_(exponentials / row_total @ _for_query_heads(v, q))
    return output, maximum[..., :1].expand_as(maximum), total[..., :1].expand_as(total)


def fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    attention_in: Tensor,
    atten_mask: Tensor | None = None,
    scale_value: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    actual_seq_qlen: Ends = None,
    actual_seq_kvlen: Ends = None,
    sparse_mode: int = 0,
    softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """From the given statistics, not recomputed ones, so that ring attention may pass those over all keys."""
    _check_attention(query, key, value, input_layout, actual_seq_qlen)
    layout = Layout(input_layout, head_num, actual_seq_qlen, actual_seq_kvlen, softmax_layout)
    grads = (torch.empty(query.shape), torch.empty(key.shape), torch.empty(value.shape))
    sequences = zip(
        *map(layout.queries, (query, dy, attention_in, grads[0])),
        *(layout.keys(tensor, query) for tensor in (key, value, grads[1], grads[2])),
        *map(layout.statistics, (softmax_max, softmax_sum)),
        strict=True,
    )
    for q, grad, out, dq, k, v, dk, dv, row_maximum, row_total in sequences:
        masked = _masked(q.shape[1], k.shape[1], atten_mask, sparse_mode, pre_tockens, next_tockens)
        probabilities = (_scores(q, k, scale_value, masked) - row_maximum).exp() / row_total  # [heads, q, kv]
        grad_probabilities = grad.float() @ _for_query_heads(v, q).transpose(1, 2)
        mean_grad = (grad.float() * out.float()).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - mean_grad) * scale_value
        dq.copy_(grad_scores @ _for_query_heads(k, q))
        dk.copy_(_sum_over_query_heads(grad_scores.transpose(1, 2) @ q.float(), k))
        dv.copy_(_sum_over_query_heads(probabilities.transpose(1, 2) @ grad.float(), v))
    return grads


def _check_attention(query: Tensor, key: Tensor, value: Tensor, input_layout: str, ends: Ends) -> None:
    _require(key.dtype == query.dtype == value.dtype, "fusion_attention: query, key and value differ in dtype")
    if input_layout == "TND":
        _require(query.shape[2] <= 768, f"fusion_attention: head dimension {query.shape[2]} is over 768")
        _require(query.shape[1] <= 256, f"fusion_attention: {query.shape[1]} heads are over 256")
        _require(max(len(query), len(key)) <= 2**20, "fusion_attention: more than 1M tokens")
        _require(ends is None or len(ends) <= 1024, "fusion_attention: more than 1K sequences")


def ring_attention_update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    actual_seq_qlen: Tensor | None = None,
    input_layout: str = "SBH",
    input_softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges attention over two sets of keys. The statistics repeat one number 8 times; TND only."""
    if (input_layout, input_softmax_layout) != ("TND", "TND"):
        raise NotImplementedError(
            f"npu_ring_attention_update: no numerics for layouts {input_layout!r} and {input_softmax_layout!r}"
        )
    maximum = torch.maximum(prev_softmax_max, cur_softmax_max)
    previous = prev_softmax_sum * (prev_softmax_max - maximum).exp()
    current = cur_softmax_sum * (cur_softmax_max - maximum).exp()
    total = previous + current
    output = prev_attn_out.float() * (previous / total)[..., :1] + cur_attn_out.float() * (current / total)[..., :1]
    return output, maximum, total


def _masked(
    rows: int, columns: int, atten_mask: Tensor | None, sparse_mode: int, pre_tokens: int, next_tokens: int
) -> Tensor | None:
    """True where a query may not see a key. Without a mask, sparse_mode and the band are ignored, as documented."""
    if atten_mask is None:
        return None
    distance = torch.arange(columns) - torch.arange(rows)[:, None]  # how far the key lies after the query
    if sparse_mode in (0, 1):
        _require(atten_mask.dim() == 2, "fusion_attention: the emulator takes only 2-D masks")
        masked = atten_mask[:rows, :columns].bool()
        return masked | (distance > next_tokens) | (distance < -pre_tokens) if sparse_mode == 0 else masked
    _require(tuple(atten_mask.shape) == MASK_TEMPLATE, f"fusion_attention: sparse_mode needs a mask of {MASK_TEMPLATE}")
    if sparse_mode == 2:
        return distance > 0
    distance = distance - (columns - rows)  # the last query is aligned with the last key
    if sparse_mode == 3:
        return distance > 0
    if sparse_mode == 4:
        return (distance > next_tokens) | (distance < -pre_tokens)
    raise NotImplementedError(f"npu_fusion_attention: no numerics for sparse_mode {sparse_mode}")


def _scores(q: Tensor, k: Tensor, scale: float, masked: Tensor | None) -> Tensor:
    scores = q.float() @ _for_query_heads(k, q).transpose(1, 2) * scale
    return scores if masked is None else scores.masked_fill(masked, -torch.inf)


def _for_query_heads(kv: Tensor, q: Tensor) -> Tensor:
    _require(q.shape[0] % kv.shape[0] == 0, "fusion_attention: query heads are no multiple of key heads")
    return kv.float().repeat_interleave(q.shape[0] // kv.shape[0], 0)


def _sum_over_query_heads(grad: Tensor, kv: Tensor) -> Tensor:
    return grad.unflatten(0, (kv.shape[0], -1)).sum(1)


# ---- loss and optimizer


def cross_entropy_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """A negative ignore_index means that no label is ignored, as documented."""
    is_label = (target >= 0) & (target < input.shape[1])
    _require(bool(is_label.all()), "cross_entropy_loss: a label is outside the vocabulary")
    log_prob = F.log_softmax(input.float(), -1)
    loss = F.nll_loss(log_prob, target.long(), reduction=reduction, ignore_index=ignore_index)
    return loss.reshape(-1), log_prob  # one element if reduced


def cross_entropy_loss_backward(
    grad_loss: Tensor, log_prob: Tensor, target: Tensor, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    counted = target != ignore_index
    grad = log_prob.float().exp()
    grad -= F.one_hot(target.long().clamp(min=0), log_prob.shape[-1])
    if reduction == "mean":
        grad /= counted.sum()
    return grad * (counted * grad_loss.float())[:, None]


def apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: Tensor,
    out: Sequence[Tensor],
    amsgrad: bool | None = None,
    maximize: bool | None = None,
) -> None:
    """The powers are those of the step before: beta ** (step - 1)."""
    if amsgrad:
        raise NotImplementedError("npu_apply_adam_w: no numerics for amsgrad")
    parameter, exp_avg, exp_avg_sq = out
    g = -grad.float() if maximize else grad.float()
    exp_avg.copy_(beta1 * exp_avg.float() + (1 - beta1) * g)
    exp_avg_sq.copy_(beta2 * exp_avg_sq.float() + (1 - beta2) * g.square())
    mean = exp_avg.float() / (1 - beta1_power * beta1)
    deviation = (exp_avg_sq.float() / (1 - beta2_power * beta2)).sqrt()
    parameter.copy_(parameter.float() * (1 - lr * weight_decay) - lr * mean / (deviation + epsilon))


def grouped_matmul_add(input: Tensor, x: Tensor, weight: Tensor, group_list: Tensor) -> Tensor:
    """input `[groups, M, N]` fp32 plus, of every group's rows, x^T weight; group_list holds the ends of the groups."""
    ends = group_list.tolist()
    products = [
        x[start:end].t().to(input.dtype) @ weight[start:end].to(input.dtype)
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return input + torch.stack(products)


OPERATORS: dict[str, Callable[..., Any]] = {
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_add_rms_norm": add_rms_norm,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward,
    "npu_rotary_mul": rotary_mul,
    "npu_rotary_mul_backward": rotary_mul_backward,
    "npu_fusion_attention": fusion_attention,
    "npu_fusion_attention_grad": fusion_attention_grad,
    "npu_fusion_attention_v3": fusion_attention,
    "npu_fusion_attention_grad_v3": fusion_attention_grad,
    "npu_ring_attention_update": ring_attention_update,
    "npu_cross_entropy_loss": cross_entropy_loss,
    "npu_cross_entropy_loss_backward": cross_entropy_loss_backward,
    "npu_apply_adam_w.out": apply_adam_w,
    "npu_grouped_matmul_add_": grouped_matmul_add,
}


# ---- aten's operators that no CPU kernel computes


def mm_dtype(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Tensor:
    return self.to(out_dtype) @ mat2.to(out_dtype)


ATEN_OPERATORS: dict[str, Callable[..., Any]] = {"mm.dtype": mm_dtype}


# ---- MC2: a matmul that communicates by itself


class CommunicatingMatmuls:
    """The operators of MC2. They get the name of a communicator and use the emulated HCCL directly, as CANN does."""

    def __init__(self, hccl: ctypes.CDLL, runtime: ctypes.CDLL) -> None:
        hccl.emulator_all_gather.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 2, ctypes.c_uint64, ctypes.c_void_p]
        runtime.aclGetRecentErrMsg.restype = ctypes.c_char_p
        self._hccl = hccl
        self._runtime = runtime

    def operators(self) -> dict[str, Callable[..., Any]]:
        return {
            "npu_all_gather_base_mm": self.all_gather_base_mm,
            "npu_mm_reduce_scatter_base": self.mm_reduce_scatter_base,
            "npu_mm_all_reduce_base": self.mm_all_reduce_base,
        }

    def all_gather_base_mm(
        self, input: Tensor, x2: Tensor, hcom: str, world_size: int, gather_output: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        self._check("all_gather_base_mm", input, x2, hcom, world_size)
        gathered = self._all_gather(input, hcom).flatten(0, 1)
        return gathered.float() @ x2.float(), gathered if gather_output else None

    def mm_reduce_scatter_base(self, input: Tensor, x2: Tensor, hcom: str, world_size: int) -> Tensor:
        self._check("mm_reduce_scatter_base", input, x2, hcom, world_size)
        _require(input.shape[0] % world_size == 0, f"mm_reduce_scatter_base: {input.shape[0]} rows do not divide")
        return self._sum(input, x2, hcom).unflatten(0, (world_size, -1))[self._rank(hcom)]

    def mm_all_reduce_base(self, x1: Tensor, x2: Tensor, hcom: str) -> Tensor:
        return self._sum(x1.flatten(0, -2), x2, hcom).unflatten(0, x1.shape[:-1])

    def _sum(self, x1: Tensor, x2: Tensor, hcom: str) -> Tensor:
        """The product, in its own dtype on each rank and summed over them in fp32."""
        product = (x1.float() @ x2.float()).to(x1.dtype)
        return self._all_gather(product, hcom).float().sum(0)

    def _all_gather(self, tensor: Tensor, hcom: str) -> Tensor:
        tensor = tensor.contiguous()
        gathered = tensor.new_empty(self._size(hcom), *tensor.shape)
        stream: Any = torch.accelerator.current_stream()  # whose stub lacks native_handle
        status = self._hccl.emulator_all_gather(
            hcom.encode(), tensor.data_ptr(), gathered.data_ptr(), tensor.nbytes, stream.native_handle
        )
        if status != 0:
            raise RuntimeError(self._runtime.aclGetRecentErrMsg().decode())
        stream.synchronize()
        return gathered

    def _size(self, hcom: str) -> int:
        return self._hccl.emulator_communicator_size(hcom.encode())

    def _rank(self, hcom: str) -> int:
        return self._hccl.emulator_communicator_rank(hcom.encode())

    def _check(self, name: str, input: Tensor, x2: Tensor, hcom: str, world_size: int) -> None:
        _require(self._size(hcom) == world_size, f"{name}: communicator {hcom!r} has not {world_size} ranks")
        _require(input.dtype in (torch.float16, torch.bfloat16), f"{name}: dtype {input.dtype}, not fp16 or bf16")
        _require(256 <= input.shape[1] < 65535, f"{name}: k = {input.shape[1]} is not in [256, 65535)")
        _require(input.is_contiguous(), f"{name}: the first matrix is transposed")
