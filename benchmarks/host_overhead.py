"""What calling our operators costs the host, and how many calls a transformer layer makes.

    python benchmarks/host_overhead.py [--rounds 20] [--output host_overhead.json]

Times are microseconds per call on tensors of a few elements, the fastest of the rounds: argument checks, autograd,
dispatch and the kernel. `around` is what of the call without gradients is not the kernel: what carries over to other
devices. `aten` is the same mathematics by PyTorch's own operations.

Calls are what a TorchDispatchMode sees in one layer of the model (the difference between two layers and one), forward
and backward: `views` only make a tensor's metadata, the rest compute.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pangu_kernels import attention, linear_cross_entropy, local_filter, rms_norm, rope, sandwich_norm, swiglu
from pangu_kernels.attention import cpu as attention_kernel
from pangu_kernels.linear_cross_entropy import cpu as linear_cross_entropy_kernel
from pangu_kernels.local_filter import reference as local_filter_kernel
from pangu_kernels.rms_norm import cpu as rms_norm_kernel
from pangu_kernels.rope import cpu as rope_kernel
from pangu_kernels.sandwich_norm import cpu as sandwich_norm_kernel
from pangu_kernels.swiglu import cpu as swiglu_kernel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pangu.config import ModelConfig
from pangu.model import Transformer, init_weights

TOKENS, HIDDEN, HEADS = 4, 16, 2
HEAD_DIM = HIDDEN // HEADS
DOCUMENTS = torch.tensor([0, TOKENS], dtype=torch.int32)
EPS = 1e-5


@dataclass(frozen=True)
class Operator:
    """`inputs` go to all three, which return a tensor or a tuple of them."""

    inputs: tuple[Tensor, ...]
    ours: Callable[..., Any]
    kernel: Callable[..., Any]
    aten: Callable[..., Any]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def operators() -> dict[str, Operator]:
    x, y, gain, other_gain = normal(TOKENS, HIDDEN), normal(TOKENS, HIDDEN), normal(HIDDEN), normal(HIDDEN)
    vocabulary = torch.randn(HIDDEN, HIDDEN)
    q, k, v = (normal(TOKENS, HEADS, HEAD_DIM) for _ in range(3))
    cos, sin = torch.randn(2, TOKENS, HEAD_DIM)
    labels = torch.randint(HIDDEN, (TOKENS,))
    half = HIDDEN // 2
    filters = (normal(half, HIDDEN, 2), normal(half), normal(HIDDEN, half, 2), normal(HIDDEN))
    scale = HEAD_DIM**-0.5
    return {
        "rms_norm": Operator(
            (x, gain),
            lambda x, gain: rms_norm(x, gain, EPS),
            lambda x, gain: rms_norm_kernel.forward(x, gain, EPS),
            lambda x, gain: F.rms_norm(x, (HIDDEN,), gain, EPS),
        ),
        "sandwich_norm": Operator(
            (x, y, gain, other_gain),
            lambda *inputs: sandwich_norm(*inputs, EPS),
            lambda *inputs: sandwich_norm_kernel.forward(*inputs, EPS),
            aten_sandwich_norm,
        ),
        "rope": Operator(
            (q,),
            lambda q: rope(q, cos, sin),
            lambda q: rope_kernel.forward(q, cos, sin),
            lambda q: q * cos[:, None] + torch.cat((-q.chunk(2, -1)[1], q.chunk(2, -1)[0]), -1) * sin[:, None],
        ),
        "swiglu": Operator((x,), swiglu, swiglu_kernel.forward, lambda x: F.silu(x[:, :half]) * x[:, half:]),
        "attention": Operator(
            (q, k, v),
            lambda *inputs: attention(*inputs, DOCUMENTS, DOCUMENTS, scale)[0],
            lambda *inputs: attention_kernel.forward(*inputs, DOCUMENTS, DOCUMENTS, scale),
            lambda *inputs: F.scaled_dot_product_attention(*(t[None].transpose(1, 2) for t in inputs), is_causal=True),
        ),
        "linear_cross_entropy": Operator(
            (x, vocabulary),
            lambda x, weight: linear_cross_entropy(x, weight, labels)[0],
            lambda x, weight: linear_cross_entropy_kernel.forward(x, weight, labels, None, 0, False, False),
            lambda x, weight: F.cross_entropy(x @ weight.T, labels, reduction="sum"),
        ),
        "local_filter": Operator(
            (x, *filters),
            lambda *inputs: local_filter(*inputs, DOCUMENTS),
            lambda *inputs: local_filter_kernel.forward(*inputs, DOCUMENTS),
            aten_local_filter,
        ),
    }


def aten_sandwich_norm(residual: Tensor, y: Tensor, post_weight: Tensor, pre_weight: Tensor) -> tuple[Tensor, Tensor]:
    residual = residual + F.rms_norm(y, (HIDDEN,), post_weight, EPS)
    return residual, F.rms_norm(residual, (HIDDEN,), pre_weight, EPS)


def aten_local_filter(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    hidden = F.conv1d(F.pad(x.T, (1, 0)), weight1, bias1)
    return F.conv1d(F.pad(hidden, (1, 0)), weight2, bias2).T


def microseconds(call: Callable[[], object], rounds: int, repeats: int = 200) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best * 1e6


def forward_and_backward(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    result = function(*inputs)
    gradients = [torch.ones_like(y) for y in (result if isinstance(result, tuple) else (result,))]
    wanted = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(function(*inputs), wanted, gradients)


def measure(operator: Operator, rounds: int) -> dict[str, float]:
    inputs = operator.inputs
    with torch.no_grad():
        alone = microseconds(lambda: operator.kernel(*inputs), rounds)
        inference = microseconds(lambda: operator.ours(*inputs), rounds)
    return {
        "no_grad": inference,
        "around": inference - alone,
        "forward": microseconds(lambda: operator.ours(*inputs), rounds),
        "forward_backward": microseconds(forward_and_backward(operator.ours, inputs), rounds),
        "aten_forward": microseconds(lambda: operator.aten(*inputs), rounds),
        "aten_forward_backward": microseconds(forward_and_backward(operator.aten, inputs), rounds),
    }


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = func.is_view or func is torch.ops.aten.detach.default
        self.calls["views" if views else str(func.overloadpacket).replace(".", "::")] += 1
        return func(*args, **(kwargs or {}))


def layer_calls(**model: Any) -> dict[str, dict[str, int]]:
    """Calls by operator of one layer, forward and backward."""
    one, two = calls(1, model), calls(2, model)
    return {part: dict((two[part] - one[part]).most_common()) for part in one}


def calls(num_layers: int, model: dict[str, Any]) -> dict[str, Counter[str]]:
    config = ModelConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        num_layers=num_layers,
        num_attention_heads=HEADS,
        intermediate_size=32,
        **model,
    )
    transformer = Transformer(config)
    init_weights(transformer, seed=0)
    tokens = torch.arange(TOKENS)
    with Count() as forward:
        hidden = transformer(tokens, tokens, DOCUMENTS)
    with Count() as backward:
        hidden.sum().backward()
    return {"forward": forward.calls, "backward": backward.calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("no_grad", "around", "forward", "forward_backward", "aten_forward", "aten_forward_backward")
    print(f"{'microseconds':<22}" + "".join(f"{column.replace('_backward', '+bwd'):>18}" for column in columns))
    times: dict[str, dict[str, float]] = {}
    for name, operator in operators().items():
        times[name] = measure(operator, options.rounds)
        print(f"{name:<22}" + "".join(f"{times[name][column]:>18.1f}" for column in columns), flush=True)
    layers = {
        "pre-norm": layer_calls(norm_placement="pre"),
        "sandwich norm": layer_calls(norm_placement="sandwich"),
        "pre-norm with LFA": layer_calls(norm_placement="pre", local_filter="two_convolutions_norm"),
    }
    print(f"\n{'calls per layer':<22}{'':10}{'ours':>8}{'matmuls':>10}{'other':>8}{'views':>8}")
    for name, parts in layers.items():
        for part, counts in parts.items():
            ours = sum(count for operator, count in counts.items() if operator.startswith("pangu::"))
            matmuls = sum(counts.get(f"aten::{operator}", 0) for operator in ("mm", "addmm", "bmm"))
            views = counts.get("views", 0)
            other = sum(counts.values()) - ours - matmuls - views
            print(f"{name:<22}{part:10}{ours:>8}{matmuls:>10}{other:>8}{views:>8}")
    if options.output:
        options.output.write_text(json.dumps({"microseconds": times, "calls_per_layer": layers}, indent=2) + "\n")


if __name__ == "__main__":
    main()
