"""What two published Ascend stacks call in one pre-norm Llama layer: written down from their sources, to be counted.

Only the calls are theirs, in their order; bf16, one sequence, no dropout, no bias, no parallelism, what recommended
flags switch on is on. A call of a stack's own C++ operator stands as the torch_npu operator that launches the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class Stack:
    """`layer(x, weights)` on `[*leading, H]`; `shapes` are those of the weights."""

    source: str
    leading: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    layer: Callable[[Tensor, dict[str, Tensor]], Tensor]


def stacks(sizes: Sizes) -> dict[str, Stack]:
    hidden, queries, keys, inner = sizes.hidden_size, sizes.query_size, sizes.key_value_size, sizes.intermediate_size
    norms = {"attention_norm": (hidden,), "feed_forward_norm": (hidden,)}
    return {
        "MindSpeed-LLM": Stack(
            "Ascend/MindSpeed-LLM c77308a (rms_norm.py, rotary_pos_embedding.py, custom_dot_product_attention.py, "
            "transformer_layer.py under mindspeed_llm/core), Ascend/MindSpeed 028de58, Megatron core 0.12.1",
            (sizes.tokens, 1),
            {
                **norms,
                "qkv": (queries + 2 * keys, hidden),
                "output": (hidden, queries),
                "gate_up": (2 * inner, hidden),
                "down": (hidden, inner),
            },
            _MindSpeedLLM(sizes),
        ),
        "torchtitan-npu": Stack(
            "torchtitan-npu 0.2.2.post2 (converters/kernels: rms_norm.py, rope.py, fusion_attention.py) on the llama3 "
            "model of torchtitan 0.2.2",
            (1, sizes.tokens),
            {
                **norms,
                "wq": (queries, hidden),
                "wk": (keys, hidden),
                "wv": (keys, hidden),
                "wo": (hidden, queries),
                "w1": (inner, hidden),
                "w3": (inner, hidden),
                "w2": (hidden, inner),
            },
            _TorchtitanNPU(sizes),
        ),
    }


class _MindSpeedLLM:
    """`[S, B, H]`; every layer computes the cosines of its queries, and again those of its keys."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.frequencies = torch.zeros(sizes.tokens, 1, 1, sizes.head_dim, device="npu")
        self.mask = torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu_(1)  # made once, for all layers

    def __call__(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        x = x + self._attention(_rms_norm(x, weights["attention_norm"]), weights)
        gate_up = F.linear(_rms_norm(x, weights["feed_forward_norm"]), weights["gate_up"])
        return x + F.linear(torch.ops.npu.npu_swiglu(gate_up, dim=-1), weights["down"])

    def _attention(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        sizes, (length, batch, _) = self.sizes, x.shape
        group = sizes.num_attention_heads // sizes.num_key_value_heads * sizes.head_dim
        qkv = F.linear(x, weights["qkv"]).view(length, batch, sizes.num_key_value_heads, group + 2 * sizes.head_dim)
        q, k, v = qkv.split([group, sizes.head_dim, sizes.head_dim], dim=3)
        q = self._rotate(q.reshape(length, batch, -1, sizes.head_dim))
        k = self._rotate(k)
        q, k, v = (t.reshape(length, batch, -1) for t in (q, k, v))
        out = torch.ops.npu.npu_fusion_attention(
            q,
            k,
            v,
            sizes.num_attention_heads,
            "SBH",
            atten_mask=self.mask,
            scale=sizes.head_dim**-0.5,
            pre_tockens=65536,
            next_tockens=0,
            sparse_mode=2,
        )[0]
        return F.linear(out, weights["output"])

    def _rotate(self, t: Tensor) -> Tensor:
        cos = (torch.cos(self.frequencies) * 1.0).to(t.dtype)
        sin = (torch.sin(self.frequencies) * 1.0).to(t.dtype)
        rotated = torch.ops.npu.npu_rotary_mul(t.contiguous(), cos, sin)
        return torch.cat((rotated, t[..., self.sizes.head_dim :]), dim=-1)  # and the part that does not turn: nothing


class _TorchtitanNPU:
    """`[B, S, H]`; the mask is made in every layer, rotation is in fp32 and of neighbouring pairs."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.frequencies = torch.zeros(1, sizes.tokens, 1, sizes.head_dim // 2, 2, device="npu")  # real and imaginary

    def __call__(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        x = x + self._attention(_rms_norm(x, weights["attention_norm"]), weights)
        y = _rms_norm(x, weights["feed_forward_norm"])
        inner = F.silu(F.linear(y, weights["w1"])) * F.linear(y, weights["w3"])
        return x + F.linear(inner, weights["w2"])

    def _attention(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        sizes, (batch, length, _) = self.sizes, x.shape
        q, k, v = (F.linear(x, weights[name]).view(batch, length, -1, sizes.head_dim) for name in ("wq", "wk", "wv"))
        wide_q, wide_k = q.float(), k.float()
        cos = self.frequencies[..., 0].repeat_interleave(2, dim=-1)
        sin = self.frequencies[..., 1].repeat_interleave(2, dim=-1)
        q = torch.ops.npu.npu_rotary_mul(wide_q, cos, sin, rotary_mode="interleave").type_as(q)
        k = torch.ops.npu.npu_rotary_mul(wide_k, cos, sin, rotary_mode="interleave").type_as(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.ops.npu.npu_fusion_attention(
            q,
            k,
            v,
            sizes.num_attention_heads,
            "BNSD",
            atten_mask=torch.triu(torch.ones((2048, 2048), dtype=torch.bool, device="npu"), diagonal=1),
            scale=sizes.head_dim**-0.5,
            sparse_mode=2,
            sync=True,
        )[0]
        return F.linear(out.transpose(1, 2).contiguous().view(batch, length, -1), weights["wo"])


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.npu.npu_rms_norm(x, weight, EPS)[0]
    return y
