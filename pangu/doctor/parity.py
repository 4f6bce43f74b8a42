"""Every operator of `pangu_kernels` on a device against its definition in fp64 on the CPU, forward and backward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import pangu_kernels
import torch
from torch import Tensor

from pangu.config import ModelConfig
from pangu.model.rope import rotary_tables

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_EXACT = {"fp32": 1e-5, "bf16": 2.5e-2}
_APPROXIMATE = {"fp32": 1e-3, "bf16": 2.5e-2}
_DOCUMENTS = (40, 1, 23)
_TOKENS = sum(_DOCUMENTS)
_WIDEST = 1024
"""Of matrices, whose products in fp64 would take long; operators without any have the model's own sizes."""


@dataclass(frozen=True)
class Parity:
    """error and tolerance are of the largest value that there should be; message is that of an error raised."""

    operator: str
    dtype: str
    error: float
    tolerance: float
    message: str = ""

    @property
    def passed(self) -> bool:
        return not self.message and self.error <= self.tolerance


@dataclass(frozen=True)
class Case:
    """`function` of tensors of these shapes, all to be differentiated by, and of constants (fp32, integers)."""

    operator: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    constants: tuple[Any, ...] = ()


def compare(model: ModelConfig, target: torch.device, *, exact: bool) -> Iterator[Parity]:
    """`exact` for devices that compute as a CPU does; others round their own way, and matmuls more than that."""
    tolerances = _EXACT if exact else _APPROXIMATE
    for case in cases(model):
        for dtype, tolerance in tolerances.items():
            try:
                error = _error(case, DTYPES[dtype], target)
            except Exception as failure:  # whatever a device's software raises is what the report is for
                yield Parity(
                    case.operator, dtype, float("nan"), tolerance, f"{type(failure).__name__}: {failure}"[:500]
                )
            else:
                yield Parity(case.operator, dtype, error, tolerance)


def cases(model: ModelConfig) -> Iterator[Case]:
    """Every operator once, some in several forms, in the sizes of the model."""
    tokens, hidden, head_dim, eps = _TOKENS, model.hidden_size, model.head_dim, model.norm_eps
    heads = min(model.num_attention_heads, 8)
    key_heads = max(1, heads * model.num_key_value_heads // model.num_attention_heads)
    narrow, vocabulary = min(hidden, _WIDEST) // 2 * 2, min(model.vocab_size, 8 * _WIDEST)
    boundaries = torch.tensor([0, *accumulate(_DOCUMENTS)], dtype=torch.int32)
    row, gain = (tokens, hidden), (hidden,)

    yield Case("rms_norm", partial(_rms_norm, eps=eps), (row, gain))
    for post, pre in ((True, True), (True, False), (False, True)):
        name = "sandwich_norm" + " post" * post + " pre" * pre
        norm = partial(_sandwich_norm, post=post, pre=pre, eps=eps)
        yield Case(name, norm, (row, row, *[gain] * (post + pre)))
    tables = rotary_tables(torch.arange(tokens), head_dim, model.rope_base)
    yield Case("rope", pangu_kernels.rope, ((tokens, heads, head_dim),), tables)
    yield Case("swiglu", pangu_kernels.swiglu, ((tokens, 2 * model.intermediate_size),))
    attended = ((tokens, heads, head_dim), (tokens, key_heads, head_dim), (tokens, key_heads, head_dim))
    yield Case("attention", partial(_attention, boundaries=boundaries, scale=head_dim**-0.5), attended)
    labels = torch.arange(tokens) * 7 % vocabulary
    yield Case("embedding", _embedding, ((vocabulary, narrow),), (labels.clone(),))
    labels[1::3] = -100
    yield Case("linear_cross_entropy", _cross_entropy, ((tokens, narrow), (vocabulary, narrow)), (labels,))
    convolutions = ((narrow // 2, narrow, 2), (narrow // 2,), (narrow, narrow // 2, 2), (narrow,))
    yield Case("local_filter", partial(_local_filter, boundaries=boundaries), ((tokens, narrow), *convolutions))
    yield Case("weight_gradient", _weight_gradient, ((tokens, narrow), (tokens, narrow // 2)))
    yield Case("squared_norm", _squared_norm, (row, gain))
    yield Case("adamw", _adamw, (row, row, row, row))


def _embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    return pangu_kernels.embedding(tokens, weight)


def _squared_norm(*tensors: Tensor) -> Tensor:
    return pangu_kernels.squared_norm(tensors)


def _error(case: Case, dtype: torch.dtype, target: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in case.shapes]
    expected = _outputs_and_gradients(case, [x.double() for x in inputs], torch.device("cpu"))
    actual = _outputs_and_gradients(case, [x.to(target) for x in inputs], target)
    errors = [
        (got.detach().cpu().double() - wanted.detach()).abs().max() / wanted.detach().abs().max().clamp(min=1.0)
        for got, wanted in zip(actual, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


def _outputs_and_gradients(case: Case, inputs: Sequence[Tensor], target: torch.device) -> list[Tensor]:
    inputs = [x.requires_grad_() for x in inputs]
    constants = [constant.to(target) for constant in case.constants]
    result = case.function(*inputs, *constants)
    outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y is not None]
    differentiable = [y for y in outputs if y.requires_grad]
    if not differentiable:
        return outputs
    # Random ones: with smooth ones sums over rows or columns would lose most digits to cancellation.
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).bfloat16().to(y.device, y.dtype) for y in differentiable]
    return [*outputs, *torch.autograd.grad(differentiable, inputs, weights)]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return pangu_kernels.rms_norm(x, weight, eps)


def _sandwich_norm(residual: Tensor, y: Tensor, *weights: Tensor, post: bool, pre: bool, eps: float) -> Any:
    return pangu_kernels.sandwich_norm(residual, y, weights[0] if post else None, weights[-1] if pre else None, eps)


def _attention(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, scale: float) -> Any:
    return pangu_kernels.attention(q, k, v, boundaries, boundaries, scale)


def _cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Any:
    return pangu_kernels.linear_cross_entropy(x, weight / weight.shape[1] ** 0.5, labels)


def _local_filter(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, boundaries: Tensor
) -> Tensor:
    scale = x.shape[1] ** -0.5
    return pangu_kernels.local_filter(x, weight1 * scale, bias1, weight2 * scale, bias2, boundaries)


def _weight_gradient(d_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Also the sum of it and what was there, twice as large."""
    d_y, x = d_y.detach(), x.detach()
    gradient = pangu_kernels.weight_gradient(d_y, x, torch.promote_types(x.dtype, torch.float32))
    accumulator = gradient.clone()
    pangu_kernels.add_weight_gradient(accumulator, d_y, x)
    return gradient, accumulator


def _adamw(*tensors: Tensor) -> tuple[Tensor, ...]:
    param, grad, average, square = (tensor.detach().clone() for tensor in tensors)
    square.abs_()
    pangu_kernels.adamw(
        [param], [grad], [average], [square], step=3, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1
    )
    return param, average, square
