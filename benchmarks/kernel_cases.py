"""The operators as kernels.py runs them: inputs of a shape, every implementation, and the work that has to be done."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pangu.config import ModelConfig

EPS = 1e-5
MODULES = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton_kernel", "cuda"), "npu": ("reference", "ascend")}
"""Files of an operator's folder that can compute on a device."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    name: str
    model: ModelConfig
    tokens: int


@dataclass(frozen=True)
class Work:
    """What no implementation can do without: every input read and every output written once, or the products."""

    bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Case:
    """One operator on one shape. `runs` maps implementations to (forward, forward and backward)."""

    runs: dict[str, tuple[Run, Run]]
    forward: Work
    both: Work


@dataclass(frozen=True)
class Operator:
    """`memory` are the bytes that inputs, gradients and the hungriest implementation take, to skip what cannot fit."""

    name: str
    make: Callable[[Shape, torch.dtype, torch.device], Case]
    memory: Callable[[Shape, int], float]
    work: Callable[[Shape, int], tuple[Work, Work]]


def modules(operator: str, device: torch.device) -> dict[str, ModuleType]:
    """An operator's implementations on a device that can be imported here."""
    found = {}
    for name in MODULES[device.type]:
        path = f"pangu_kernels.{operator}.{name}"
        if importlib.util.find_spec(path) is None or (
            name.startswith("triton") and not importlib.util.find_spec("triton")
        ):
            continue
        found[name] = importlib.import_module(path)
    return found


def eager(function: Callable[..., Any], inputs: Sequence[Tensor], *constants: Any) -> tuple[Run, Run]:
    """Plain PyTorch, with PyTorch's own gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward() -> object:
        with torch.no_grad():
            return function(*leaves, *constants)

    def both() -> object:
        result = function(*leaves, *constants)
        outputs = result if isinstance(result, tuple) else (result,)
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])

    return forward, both


def rms_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    x, gain = _normal(dtype, device, (shape.tokens, shape.model.hidden_size), (shape.model.hidden_size,))
    runs = {"eager": eager(lambda x, gain: F.rms_norm(x, gain.shape, gain, EPS), (x, gain))}
    for name, module in modules("rms_norm", device).items():

        def both(module: ModuleType = module) -> object:
            y, rstd = module.forward(x, gain, EPS)
            return module.backward(y, x, gain, rstd)

        runs[name] = (lambda module=module: module.forward(x, gain, EPS), both)
    return Case(runs, *_norm_work(shape, dtype.itemsize))


def sandwich_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    size = shape.model.hidden_size
    residual, y, post, pre = _normal(dtype, device, (shape.tokens, size), (shape.tokens, size), (size,), (size,))

    def separate(residual: Tensor, y: Tensor, post: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Norm, addition, norm, and in backward the addition of the residual stream's two gradients."""
        new_residual = residual + F.rms_norm(y, (size,), post, EPS)
        return new_residual, F.rms_norm(new_residual, (size,), pre, EPS)

    runs = {"eager": eager(separate, (residual, y, post, pre))}
    for name, module in modules("sandwich_norm", device).items():

        def both(module: ModuleType = module) -> object:
            new, normed, post_rstd, pre_rstd = module.forward(residual, y, post, pre, EPS)
            return module.backward(new, normed, y, new, post, pre, post_rstd, pre_rstd)

        runs[name] = (lambda module=module: module.forward(residual, y, post, pre, EPS), both)
    return Case(runs, *_sandwich_work(shape, dtype.itemsize))


def rope(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    model = shape.model
    (x,) = _normal(dtype, device, (shape.tokens, model.num_attention_heads, model.head_dim))
    cos, sin = _normal(dtype if device.type == "npu" else torch.float32, device, *[(shape.tokens, model.head_dim)] * 2)

    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * cos[:, None] + turned * sin[:, None]).to(dtype)

    runs = {"eager": eager(rotate, (x,))}
    for name, module in modules("rope", device).items():

        def both(module: ModuleType = module) -> object:
            return module.backward(module.forward(x, cos, sin), cos, sin)

        runs[name] = (lambda module=module: module.forward(x, cos, sin), both)
    return Case(runs, *_rope_work(shape, dtype.itemsize))


def swiglu(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    (x,) = _normal(dtype, device, (shape.tokens, 2 * shape.model.intermediate_size))

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    runs = {"eager": eager(gated, (x,))}
    for name, module in modules("swiglu", device).items():

        def both(module: ModuleType = module) -> object:
            return module.backward(module.forward(x), x)

        runs[name] = (lambda module=module: module.forward(x), both)
    return Case(runs, *_swiglu_work(shape, dtype.itemsize))


def attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    model, tokens = shape.model, shape.tokens
    heads, key_heads, scale = model.num_attention_heads, model.num_key_value_heads, model.head_dim**-0.5
    q, k, v = _normal(dtype, device, *[(tokens, count, model.head_dim) for count in (heads, key_heads, key_heads)])
    ends = torch.tensor([0, tokens], dtype=torch.int32)

    def sdpa(*inputs: Tensor) -> Tensor:
        q, k, v = (x[None].transpose(1, 2) for x in inputs)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != key_heads)

    runs = {"eager": eager(sdpa, (q, k, v))}
    for name, module in modules("attention", device).items():

        def both(module: ModuleType = module) -> object:
            out, logsumexp = module.forward(q, k, v, ends, ends, scale)
            return module.backward(out, q, k, v, out, logsumexp, ends, ends, scale)

        runs[name] = (lambda module=module: module.forward(q, k, v, ends, ends, scale), both)
    return Case(runs, *_attention_work(shape, dtype.itemsize))


def embedding(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """A table in fp32, whatever the dtype of activations, with a dense gradient."""
    size, vocabulary = shape.model.hidden_size, shape.model.vocab_size
    weight, d_y = _normal(torch.float32, device, (vocabulary, size), (shape.tokens, size))
    tokens = torch.randint(vocabulary, (shape.tokens,), device=device)
    runs = {"eager": eager(lambda weight: F.embedding(tokens, weight), (weight,))}
    for name, module in modules("embedding", device).items():

        def both(module: ModuleType = module) -> object:
            return F.embedding(tokens, weight), module.backward(d_y, tokens, vocabulary)

        runs[name] = (lambda: F.embedding(tokens, weight), both)
    return Case(runs, *_embedding_work(shape, dtype.itemsize))


def linear_cross_entropy(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Naive: all logits at once, in fp32 as the loss wants them."""
    size, vocabulary = shape.model.hidden_size, shape.model.vocab_size
    x, weight = _normal(dtype, device, (shape.tokens, size), (vocabulary, size))
    labels = torch.randint(vocabulary, (shape.tokens,), device=device)

    def naive(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.T).float(), labels, reduction="sum")

    runs = {"eager": eager(naive, (x, weight))}
    for name, module in modules("linear_cross_entropy", device).items():
        runs[name] = (
            lambda module=module: module.forward(x, weight, labels, None, 0, False, False),
            lambda module=module: module.forward(x, weight, labels, None, 0, True, True),
        )
    return Case(runs, *_cross_entropy_work(shape, dtype.itemsize))


def local_filter(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    size, tokens = shape.model.hidden_size, shape.tokens
    shapes = ((tokens, size), (size // 2, size, 2), (size // 2,), (size, size // 2, 2), (size,))
    inputs = _normal(dtype, device, *shapes)
    ends = torch.tensor([0, tokens], dtype=torch.int32)

    def convolve(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        hidden = F.conv1d(F.pad(x.T, (1, 0)), weight1, bias1)
        return F.conv1d(F.pad(hidden, (1, 0)), weight2, bias2).T

    runs = {"eager": eager(convolve, inputs)}
    for name, module in modules("local_filter", device).items():

        def both(module: ModuleType = module) -> object:
            y, hidden = module.forward(*inputs, ends)
            return module.backward(y, inputs[0], hidden, inputs[1], inputs[3], ends)

        runs[name] = (lambda module=module: module.forward(*inputs, ends), both)
    return Case(runs, *_local_filter_work(shape, dtype.itemsize))


def squared_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Of the fp32 gradient of one feed-forward matrix; it has no backward."""
    (x,) = _normal(torch.float32, device, (shape.model.hidden_size * shape.model.intermediate_size,))
    runs: dict[str, tuple[Run, Run]] = {"eager": (lambda: torch.linalg.vector_norm(x).square(),) * 2}
    for name, module in modules("squared_norm", device).items():
        runs[name] = (lambda module=module: module.squared_norm([x]),) * 2
    return Case(runs, *_squared_norm_work(shape, dtype.itemsize))


def adamw(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """fp32 state of one feed-forward matrix, whatever the dtype of activations; it has no backward."""
    size = shape.model.hidden_size * shape.model.intermediate_size
    param, grad, exp_avg, exp_avg_sq = _normal(torch.float32, device, *[(size,)] * 4)
    state, settings = ([param], [grad], [exp_avg], [exp_avg_sq.abs_()]), (None, 3, 1e-6, 0.9, 0.95, 1e-8, 0.1)
    parameter = torch.nn.Parameter(param.clone())
    parameter.grad = grad.clone()
    optimizer = torch.optim.AdamW([parameter], lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, foreach=False, fused=False)
    runs: dict[str, tuple[Run, Run]] = {"eager": (optimizer.step, optimizer.step)}
    for name, module in modules("adamw", device).items():
        runs[name] = (lambda module=module: module.step_(*state, *settings),) * 2
    return Case(runs, *_adamw_work(shape, dtype.itemsize))


def _normal(dtype: torch.dtype, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def _traffic(forward: float, backward: float, itemsize: int) -> tuple[Work, Work]:
    return Work(bytes=forward * itemsize), Work(bytes=(forward + backward) * itemsize)


def _norm_work(shape: Shape, itemsize: int) -> tuple[Work, Work]:
    """x to y; d_y and x to d_x."""
    return _traffic(2 * _stream(shape), 3 * _stream(shape), itemsize)


def _sandwich_work(shape: Shape, itemsize: int) -> tuple[Work, Work]:
    """residual and y to both results; their gradients, y and new_residual to two gradients."""
    return _traffic(4 * _stream(shape), 6 * _stream(shape), itemsize)


def _rope_work(shape: Shape, itemsize: int) -> tuple[Work, Work]:
    queries = shape.tokens * shape.model.num_attention_heads * shape.model.head_dim
    return _traffic(2 * queries, 2 * queries, itemsize)


def _swiglu_work(shape: Shape, itemsize: int) -> tuple[Work, Work]:
    inner = shape.tokens * shape.model.intermediate_size
    return _traffic(3 * inner, 5 * inner, itemsize)


def _attention_work(shape: Shape, itemsize: int) -> tuple[Work, Work]:
    """Two products forward and four backward over the causal half of all pairs (recomputed scores do not count)."""
    product = shape.tokens**2 * shape.model.num_attention_heads * shape.model.head_dim
    return Work(flops=2 * product), Work(flops=6 * product)


def _cross_entropy_work(shape: Shape, itemsize: int) -> tuple[Work, Work]:
    product = 2 * shape.tokens * shape.model.hidden_size * shape.model.vocab_size
    return Work(flops=product), Work(flops=3 * product)


def _local_filter_work(shape: Shape, itemsize: int) -> tuple[Work, Work]:
    product = 2 * shape.tokens * 2 * shape.model.hidden_size**2  # two convolutions, two taps, H to H/2 channels
    return Work(flops=product), Work(flops=3 * product)


def _embedding_work(shape: Shape, itemsize: int) -> tuple[Work, Work]:
    """Rows to rows; the gradient's rows to a table that is written whole."""
    rows, table = _stream(shape), shape.model.vocab_size * shape.model.hidden_size
    return _traffic(2 * rows, 2 * rows + table, 4)


def _squared_norm_work(shape: Shape, itemsize: int) -> tuple[Work, Work]:
    work = Work(bytes=4 * shape.model.hidden_size * shape.model.intermediate_size)
    return work, work


def _adamw_work(shape: Shape, itemsize: int) -> tuple[Work, Work]:
    """Four tensors read, three written."""
    work = Work(bytes=7 * 4 * shape.model.hidden_size * shape.model.intermediate_size)
    return work, work


def _stream(shape: Shape) -> int:
    """Elements of the residual stream."""
    return shape.tokens * shape.model.hidden_size


def _weights(shape: Shape) -> float:
    return 2 * shape.model.hidden_size**2


OPERATORS = (
    Operator("rms_norm", rms_norm, lambda s, size: 10 * size * _stream(s), _norm_work),
    Operator("sandwich_norm", sandwich_norm, lambda s, size: 20 * size * _stream(s), _sandwich_work),
    Operator("rope", rope, lambda s, size: 10 * _rope_work(s, size)[0].bytes, _rope_work),
    Operator("swiglu", swiglu, lambda s, size: 5 * _swiglu_work(s, size)[0].bytes, _swiglu_work),
    Operator(
        "attention",
        attention,
        lambda s, size: 6 * 4.0 * s.model.num_attention_heads * s.tokens**2,  # the reference holds all scores, in fp32
        _attention_work,
    ),
    Operator("embedding", embedding, lambda s, size: 3 * _embedding_work(s, size)[1].bytes, _embedding_work),
    Operator(
        "linear_cross_entropy",
        linear_cross_entropy,
        lambda s, size: 4.0 * s.model.vocab_size * (4 * s.tokens + 3 * s.model.hidden_size),
        _cross_entropy_work,
    ),
    Operator(
        "local_filter", local_filter, lambda s, size: size * (8 * _weights(s) + 12 * _stream(s)), _local_filter_work
    ),
    Operator(
        "squared_norm", squared_norm, lambda s, size: 2 * _squared_norm_work(s, size)[0].bytes, _squared_norm_work
    ),
    Operator("adamw", adamw, lambda s, size: 1.6 * _adamw_work(s, size)[0].bytes, _adamw_work),
)
