"""The NPU's kernels through the genuine torch_npu on an emulated CANN: equal to the references, by the fused operators.

What is emulated here computes by PyTorch on a CPU: rounding and speed of a device are not shown.
"""

import importlib
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import test_adamw
import test_attention
import torch
from operator_cases import Case, cases
from test_operators import TOLERANCES, assert_near, in_fp64, layout, outputs_and_gradients, recorded_calls
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pangu.device.cann_emulator import Emulator, emulated_npu

pytestmark = pytest.mark.ascend

CASES = [pytest.param(case, id=case.name) for case in cases()]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NPU = "npu:0"


@pytest.fixture(scope="module", autouse=True)
def emulator() -> Iterator[Emulator]:
    if find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed")
    with emulated_npu() as installed:
        yield installed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_expression_in_fp64(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, NPU)
    outputs, gradients = outputs_and_gradients(case.function, inputs)
    expected, expected_gradients = outputs_and_gradients(case.plain, [in_fp64(x) for x in inputs])
    for actual, wanted in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        assert actual.device.type == "npu"
        assert_near(actual.cpu(), wanted, TOLERANCES[dtype])
    assert all(y.dtype in (dtype, torch.float32) and y.is_contiguous() for y in outputs)
    assert [g.dtype for g in gradients] == [dtype] * len(gradients)
