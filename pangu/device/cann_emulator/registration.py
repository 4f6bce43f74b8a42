"""Puts numerics under torch_npu's own operators: its host code runs first, then a function of fused_ops.py.

Host code checks the arguments, allocates the outputs and reaches its aclnn function, all for real. The function then
fills those outputs, whose shapes it has to match.
"""

import ctypes
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pangu.device.cann_emulator.fused_ops import ATEN_OPERATORS, OPERATORS, CommunicatingMatmuls

# Arguments that choose how a device computes and not what, or matter only beside another that is refused.
_WITHOUT_EFFECT = {"comm_turn", "gen_mask_parallel", "inner_precise", "numels", "offset", "seed", "softmax_in", "sync"}
_WITHOUT_EFFECT |= {"grad_zloss", "lse_for_zloss"}


def register(runtime: ctypes.CDLL, hccl: ctypes.CDLL) -> list[torch.library.Library]:
    """Replaces the kernels of the operators in fused_ops.py, for as long as the returned objects live."""
    operators = {"npu": OPERATORS | CommunicatingMatmuls(hccl, runtime).operators(), "aten": ATEN_OPERATORS}
    libraries = []
    for namespace, functions in operators.items():
        library = torch.library.Library(namespace, "IMPL")
        for name, numerics in functions.items():
            kernel = _with_numerics(f"{namespace}::{name}", numerics, runtime)
            library.impl(name, kernel, "PrivateUse1", with_keyset=True, allow_override=True)
        libraries.append(library)
    return libraries


def _with_numerics(name: str, numerics: Callable[..., Any], runtime: ctypes.CDLL) -> Callable[..., Any]:
    genuine = torch.library.get_kernel(name, "PrivateUse1")
    operator, _, overload = name.partition(".")
    schema = torch._C._get_schema(operator, overload)
    taken = inspect.signature(numerics).parameters

    def kernel(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if runtime.emulator_in_host_code():  # of another operator, which wants the outputs' shapes only
            return genuine.call_boxed(keys, *args, **kwargs)
        runtime.emulator_enter_host_code()
        try:
            outputs = genuine.call_boxed(keys, *args, **kwargs)
            torch.accelerator.current_stream().synchronize()
        finally:
            runtime.emulator_leave_host_code()
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        _refuse_what_is_not_taken(name, schema, given, taken)
        with torch.no_grad():
            results = numerics(**{key: _on_cpu(value) for key, value in given.items() if key in taken})
            _fill(name, outputs, results)
        return outputs

    return kernel


def _refuse_what_is_not_taken(
    name: str, schema: torch._C.FunctionSchema, given: Mapping[str, Any], taken: Mapping[str, Any]
) -> None:
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
    """Writes results into outputs; None leaves one, or all, as host code made them."""
    if isinstance(results, Tensor):
        outputs, results = [outputs], [results]
    for output, result in zip(outputs, results or [], strict=False):
        if result is None:
            continue
        if output.shape != result.shape:
            raise RuntimeError(f"{name}: host code made {tuple(output.shape)}, the emulator {tuple(result.shape)}")
        _on_cpu(output).copy_(result)
