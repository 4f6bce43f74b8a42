"""What torch_npu's own operators compute, in plain PyTorch.

torch_npu's host code still runs first: it checks the arguments, allocates the outputs and reaches its aclnn function.
The functions here then fill those outputs, whose shapes and dtypes they have to match. They see CPU tensors over the
device's memory, compute in fp32, and take the operator's arguments by the names in its schema; an argument that they
do not take must have its default. What aclnn documents as unsupported, and host code lets through, is refused.
"""

import ctypes
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UNLIMITED = 2**31 - 1  # pre_tokens and next_tokens of a band without edges
MASK_TEMPLATE = (2048, 2048)  # of the sparse modes that build their mask themselves

# Arguments that choose how, and not what, a device computes.
_WITHOUT_EFFECT = {"inner_precise", "gen_mask_parallel", "sync", "seed", "offset", "numels", "comm_turn", "softmax_in"}


def register(runtime: ctypes.CDLL, hccl: ctypes.CDLL) -> None:
    """Puts the functions of this module under torch_npu's schemas. To be called once, after torch_npu is imported."""
    library = torch.library.Library("npu", "IMPL")
    matmuls = CommunicatingMatmuls(hccl, runtime)
    for name, numerics in (*OPERATORS.items(), *matmuls.operators().items()):
        genuine = torch.library.get_kernel(f"npu::{name}", "PrivateUse1")
        kernel = _with_numerics(f"npu::{name}", genuine, numerics, runtime)
        library.impl(name, kernel, "PrivateUse1", with_keyset=True, allow_override=True)
    _registrations.append(library)


# A library's kernels go when the object does.
_registrations: list[torch.library.Library] = []


def _with_numerics(
    name: str, genuine: Any, numerics: Callable[..., Any], runtime: ctypes.CDLL
) -> Callable[..., Any]:
    """torch_npu's kernel followed by `numerics`, whose results are written into the kernel's outputs."""
    schema = torch._C._get_schema(*_split_overload(name))
    taken = inspect.signature(numerics).parameters

    def kernel(keys: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if runtime.emulator_in_host_code():
            return genuine.call_boxed(keys, *args, **kwargs)
        runtime.emulator_enter_host_code()
        try:
            outputs = genuine.call_boxed(keys, *args, **kwargs)
            torch.npu.current_stream().synchronize()
        finally:
            runtime.emulator_leave_host_code()
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        _refuse_what_is_not_taken(name, schema, given, taken)
        with torch.no_grad():
            results = numerics(**{key: _on_cpu(value) for key, value in given.items() if key in taken})
            _fill(name, outputs, results)
        return outputs

    return kernel


def _split_overload(name: str) -> tuple[str, str]:
    operator, _, overload = name.partition(".")
    return operator, overload


def _refuse_what_is_not_taken(name: str, schema: torch.FunctionSchema, given: dict[str, Any], taken: Any) -> None:
    for argument in schema.arguments:
        if argument.name in taken or argument.name in _WITHOUT_EFFECT:
            continue
        if given.get(argument.name, argument.default_value) != argument.default_value:
            raise NotImplementedError(f"{name}: the CANN emulator has no numerics for argument {argument.name!r}")


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.ops.cann_emulator.alias_on_cpu(value) if value.device.type == "npu" else value
    if isinstance(value, (list, tuple)):
        return [_on_cpu(item) for item in value]
    return value


def _fill(name: str, outputs: Any, results: Any) -> None:
    """Writes results into outputs; None leaves an output as host code made it."""
    if results is None:
        return
    if isinstance(outputs, Tensor):
        outputs, results = (outputs,), (results,)
    for output, result in zip(outputs, results, strict=False):
        if result is None:
            continue
        if output.shape != result.shape:
            raise RuntimeError(f"{name}: host code made {tuple(output.shape)}, the emulator {tuple(result.shape)}")
        _on_cpu(output).copy_(result)


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
    total = (x1.float() + x2.float()).to(x1.dtype)
    return *rms_norm(total, gamma, epsilon), total


def _normalized_dims(input: Tensor, gamma: Tensor) -> tuple[int, ...]:
    _require(input.shape[input.dim() - gamma.dim() :] == gamma.shape, "rms_norm: gamma is not of the last dimensions")
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
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output and, repeated 8 times along a last dimension, each row's largest score and sum of exps."""
    layout = _Layout(input_layout, head_num, query, key, value, actual_seq_qlen, actual_seq_kvlen)
    output = torch.empty(query.shape[:-1] + (layout.output_width(),), dtype=torch.float32)
    statistics = layout.statistics_shape()
    maximum, total = torch.empty(statistics), torch.empty(statistics)
    for rows in layout.sequences():
        q, k, v = rows.query(query), rows.key(key), rows.key(value)
        scores = _scores(q, k, scale, rows.masked(atten_mask, sparse_mode, pre_tockens, next_tockens))
        row_maximum = scores.amax(-1, keepdim=True)
        exps = (scores - row_maximum).exp()
        row_total = exps.sum(-1, keepdim=True)
        rows.query(output).copy_(_to_query_heads(v, q).mul(1) if False else (exps / row_total) @ _repeat(v, q))
        rows.statistics(maximum).copy_(row_maximum.expand(-1, -1, 8))
        rows.statistics(total).copy_(row_total.expand(-1, -1, 8))
    return output, maximum, total
