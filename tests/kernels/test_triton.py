"""Triton's kernels in its interpreter, on the CPU: they are held to what every implementation is held to."""

import importlib
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import test_adamw
import torch
from operator_cases import Case, cases
from pangu_kernels import triton_support
from test_operators import assert_near, in_fp64, layout, outputs_and_gradients, recorded_calls
from torch import Tensor
from torch.utils._pytree import tree_leaves

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("on this machine's GPU the tests of the operators run the same kernels", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

KERNELS = {
    "adamw": ("adamw", "step_"),
    "linear_cross_entropy": ("linear_cross_entropy", "forward"),
    "local_filter": ("local_filter", "forward"),
    "local_filter_backward": ("local_filter", "backward"),
    "rms_norm": ("rms_norm", "forward"),
    "rms_norm_backward": ("rms_norm", "backward"),
    "rope": ("rope", "forward"),
    "rope_backward": ("rope", "backward"),
    "sandwich_norm": ("sandwich_norm", "forward"),
    "sandwich_norm_backward": ("sandwich_norm", "backward"),
    "swiglu": ("swiglu", "forward"),
    "swiglu_backward": ("swiglu", "backward"),
}
CASES = [pytest.param(case, id=case.name) for case in cases() if case.operator in KERNELS]
CPU = torch.device("cpu")
# Of the largest value. The interpreter cuts bf16 off where devices round.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Rounds between its convolutions; the gradient of its first bias is a sum in which most digits cancel.
LOCAL_FILTER_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2.5e-2}


def reference_of(operator: str, function: str) -> Callable[..., Any]:
    reference: Callable[..., Any] = getattr(importlib.import_module(f"pangu_kernels.{operator}.reference"), function)
    return reference


def tolerance(case: Case, dtype: torch.dtype) -> float:
    return (LOCAL_FILTER_TOLERANCES if case.operator == "local_filter" else TOLERANCES)[dtype]


@pytest.fixture(scope="module", autouse=True)
def _interpreted_on_the_cpu() -> Iterator[None]:
    """Operators on the CPU are computed by Triton's kernels; that they are interpreted is decided at their import."""
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("pangu", "IMPL") as library:
        patch.setenv("TRITON_INTERPRET", "1")
        for name, (operator, function) in KERNELS.items():
            library.impl(name, triton_support.triton_or(reference_of(operator, function)), "CPU", allow_override=True)
            importlib.import_module(f"pangu_kernels.{operator}.triton_kernel")
        yield


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: Case) -> None:
    for (operator, args), function in zip(
        recorded_calls(case, torch.float32, CPU), ("forward", "backward"), strict=True
    ):
        expected_args = [x.clone() if isinstance(x, Tensor) else x for x in args]
        expected, actual = reference_of(case.operator, function)(*expected_args), operator(*args)
        for a, b in zip(tree_leaves((actual, args)), tree_leaves((expected, expected_args)), strict=True):
            if isinstance(b, Tensor):
                assert layout(a) == layout(b)
                assert_near(a, b, tolerance(case, torch.float32))


def small_cases() -> Iterator[Case]:
    by_name = {case.name: case for case in cases()}
    for name in ("rms_norm-3x8", "swiglu-3x254", "linear_cross_entropy-7x129x3", "local_filter-3x0x1x5"):
        yield by_name[name]
    for weights, name in enumerate(("", "-post", "-post-pre")):
        shapes = [(3, 9)] * 2 + [(9,)] * weights
        yield replace(
            by_name["sandwich_norm-1x1" + name],
            make_inputs=lambda make, shapes=shapes: [make.normal(*shape) for shape in shapes],
        )


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name)
def test_rows_of_several_tiles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pangu_kernels.triton_tiles.TILE", 4)
    for operator in ("rms_norm", "sandwich_norm"):
        monkeypatch.setattr(importlib.import_module(f"pangu_kernels.{operator}.triton_kernel"), "BACKWARD_ROWS", 2)
    test_equals_the_plain_expression_in_fp64(case, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_expression_in_fp64(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    outputs, gradients = outputs_and_gradients(case.function, inputs)
    expected, expected_gradients = outputs_and_gradients(case.plain, [in_fp64(x) for x in inputs])
    for actual, wanted in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        assert_near(actual, wanted, tolerance(case, dtype))
    assert [g.dtype for g in gradients] == [dtype] * len(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_adamw_equals_the_reference(scale: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    state = [test_adamw.tensors(CPU, dtype) for _ in range(4)]
    state[3] = [t.abs() for t in state[3]]
    expected = [[t.float() for t in kind] for kind in state]
    grad_scale = None if scale is None else torch.tensor(scale)
    reference_of("adamw", "step_")(*expected, grad_scale, 3, *test_adamw.HYPERPARAMETERS.values())
    torch.ops.pangu.adamw(*state, grad_scale, 3, *test_adamw.HYPERPARAMETERS.values())
    for kind in (0, 2, 3):
        for actual, wanted in zip(state[kind], expected[kind], strict=True):
            assert_near(actual, wanted, 1e-6 if dtype == torch.float32 else 8e-3)


def test_adamw_takes_several_tiles_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("pangu_kernels.adamw.triton_kernel")
    monkeypatch.setattr(kernel, "TILE", 16)
    monkeypatch.setattr(kernel, "_MAX_PROGRAMS", 3)
    test_adamw_equals_the_reference(0.25, torch.float32)


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_computes_not_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the reference ran")

    operator, function = KERNELS[name]
    replaced = "softmax_cross_entropy_" if operator == "linear_cross_entropy" else function
    monkeypatch.setattr(importlib.import_module(f"pangu_kernels.{operator}.reference"), replaced, refuse)
    if operator == "adamw":
        test_adamw.test_updates_parameters_that_require_gradients(CPU)
    else:
        recorded_calls(next(case for case in cases() if case.operator == operator), torch.bfloat16, CPU)


@pytest.mark.parametrize("name", KERNELS)
def test_is_registered_for_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pangu::{name}", "CUDA")


def test_without_triton_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in [name for name in sys.modules if name.startswith("pangu_kernels") and "triton_" in name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    load = triton_support._load.__wrapped__  # without its cache
    triton_support._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for function in ("forward", "backward"):
            reference = reference_of("rms_norm", function)
            assert load(reference) is reference
    assert [record.message.partition(",")[0] for record in caplog.records] == ["Triton is not installed"]


def test_importing_the_operators_imports_no_triton() -> None:
    code = "import sys, pangu_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
