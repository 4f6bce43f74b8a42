"""The NPU's kernels through the genuine torch_npu on an emulated CANN: equal to the references, by the fused operators.

What is emulated computes by PyTorch on a CPU: rounding and speed of a device are not shown.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import test_adamw
import test_attention
import test_bad_inputs
import torch
from operator_cases import Case, Maker, boundaries, cases
from pangu_kernels import adamw, ascend_support, attention, linear_cross_entropy, rms_norm, rope, swiglu
from pangu_kernels.attention import ascend as attention_ascend
from test_operators import TOLERANCES, assert_near, in_fp64, layout, outputs_and_gradients, recorded_calls
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pangu.device.cann_emulator import Emulator, emulated_npu

pytestmark = pytest.mark.ascend

CASES = [pytest.param(case, id=case.name) for case in cases()]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NPU = "npu:0"  # a name: the device is there only once the emulator is


@pytest.fixture(scope="module", autouse=True)
def emulator() -> Iterator[Emulator]:
    if find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed")
    with emulated_npu() as installed:
        yield installed


@pytest.fixture
def npu() -> torch.device:
    return torch.device(NPU)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been logged about operators that run unfused."""
    ascend_support.warn_unfused.cache_clear()
    caplog.set_level(logging.WARNING, logger=ascend_support.__name__)
    return lambda: [record.message for record in caplog.records if record.name == ascend_support.__name__]


# ---- equality


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: Case, dtype: torch.dtype, npu: torch.device) -> None:
    """On the very arguments the operators get, saved statistics included; in what they write too."""
    reference = importlib.import_module(f"pangu_kernels.{case.operator}.reference")
    for (operator, args), function in zip(
        recorded_calls(case, dtype, npu), (reference.forward, reference.backward), strict=True
    ):
        on_cpu = tree_map(lambda x: x.cpu().clone() if isinstance(x, Tensor) else x, args)
        expected, actual = function(*on_cpu), operator(*args)
        for a, b in zip(tree_leaves((actual, args)), tree_leaves((expected, on_cpu)), strict=True):
            if isinstance(b, Tensor):
                assert layout(a) == layout(b)
                assert_near(a.cpu(), b, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gains_of_another_dtype(gain_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """fp32 gains beside a bf16 stream are what training has."""
    make = Maker(dtype, torch.device(NPU), True)
    x, gain = make.normal(3, 8), torch.randn(8, device=NPU, dtype=gain_dtype, requires_grad=True)
    for function in (
        lambda x, gain: rms_norm(x, gain, 1e-5),
        lambda x, gain: torch.ops.pangu.sandwich_norm(x, x, gain, gain, 1e-5)[:2],
    ):
        with torch.no_grad():
            actual, expected = function(x, gain), function(x.cpu(), gain.cpu())
        for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
            assert a.dtype == dtype
            assert_near(a.cpu(), b, TOLERANCES[torch.bfloat16])
    (d_gain,) = torch.autograd.grad(rms_norm(x, gain, 1e-5).sum(), gain)
    assert d_gain.dtype == gain_dtype


@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(0.25)], ids=str)
def test_adamw_equals_pytorch(scale: float | Tensor, npu: torch.device) -> None:
    test_adamw.test_equals_pytorch(scale, torch.float32, npu)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_adamw_equals_the_reference(scale: float | None, npu: torch.device) -> None:
    test_adamw.test_equals_the_reference(scale, npu)


def test_adamw_passes_over_parameters_without_elements() -> None:
    """Shards of FSDP may be empty, and CANN's kernel is not documented for that."""
    params, grads, exp_avgs, exp_avg_sqs = ([torch.zeros(size, device=NPU) for size in (0, 3)] for _ in range(4))
    params[1] += 1
    grads[1] += 1
    adamw(params, grads, exp_avgs, exp_avg_sqs, step=1, **test_adamw.HYPERPARAMETERS)
    torch.testing.assert_close(params[1].cpu(), torch.full((3,), 0.89))
    adamw(params[:1], grads[:1], exp_avgs[:1], exp_avg_sqs[:1], step=1, **test_adamw.HYPERPARAMETERS)


@pytest.mark.parametrize(
    "test",
    [
        test_attention.test_takes_queries_keys_and_values_as_slices_of_one_projection,
        test_attention.test_documents_do_not_see_one_another,
        test_attention.test_one_token_at_a_time_equals_all_at_once,
        functools.partial(test_attention.test_attention_in_two_parts_merged_by_the_logsumexp, 1),
        functools.partial(test_attention.test_attention_in_two_parts_merged_by_the_logsumexp, 3),
        functools.partial(test_attention.test_no_tokens_at_all, ()),
        functools.partial(test_attention.test_no_tokens_at_all, (0, 0)),
    ],
    ids=str,
)
def test_what_holds_for_attention_on_every_device(test: Callable[..., None], npu: torch.device) -> None:
    test(device=npu)


@pytest.mark.parametrize(("limit", "value"), [("MAX_DOCUMENTS", 2), ("MAX_TOKENS", 6)])
@pytest.mark.parametrize("name", ["many_documents", "gqa", "all_keys_or_none"])
def test_documents_beyond_a_limit_are_spread_over_several_calls(
    name: str, limit: str, value: int, monkeypatch: pytest.MonkeyPatch, emulator: Emulator
) -> None:
    monkeypatch.setattr(attention_ascend, limit, value)
    case = next(case for case in cases() if case.name == f"attention-{name}")
    with emulator.record() as calls:
        test_equals_the_plain_expression_in_fp64(case, torch.float32)
    reached = [call.name for call in calls]
    assert reached.count("aclnnFlashAttentionVarLenScoreV4") > 1
    assert reached.count("aclnnFlashAttentionVarLenScoreV4") == reached.count("aclnnFlashAttentionUnpaddingScoreGradV4")


@pytest.mark.parametrize("operator", ["rms_norm", "sandwich_norm", "rope", "swiglu", "linear_cross_entropy"])
def test_no_tokens(operator: str, said: Callable[[], list[str]]) -> None:
    case = next(case for case in cases() if case.operator == operator)
    inputs = [
        x.detach()[:0].requires_grad_(x.requires_grad) if isinstance(x, Tensor) and index != 1 else x
        for index, x in enumerate(case.inputs(torch.float32, NPU))
    ]
    if operator in ("sandwich_norm", "rope"):  # whose second argument has a row per token too
        inputs[1] = inputs[1].detach()[:0].requires_grad_(inputs[1].requires_grad)
    if operator == "sandwich_norm":
        inputs[2:] = case.inputs(torch.float32, NPU)[2:]
    outputs, gradients = outputs_and_gradients(case.function, inputs)
    expected, expected_gradients = outputs_and_gradients(case.function, [in_fp64(x) for x in inputs])
    for a, b in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.double().cpu(), b)
    assert not said()


# ---- which kernels are reached: all of them, in order, so that what is launched beside the fused one shows

REACHED = {
    "rms_norm": (["aclnnRmsNorm"], ["aclnnRmsNormGrad"]),
    "sandwich_norm": (
        ["aclnnRmsNorm", "aclnnAddRmsNorm"],
        ["aclnnRmsNormGrad", "aclnnInplaceAdd", "aclnnRmsNormGrad"],
    ),
    "rope": (["aclnnRotaryPositionEmbeddingV2"], ["aclnnRotaryPositionEmbeddingGrad"]),
    "swiglu": (["aclnnSwiGlu"], ["aclnnSwiGluGrad"]),
    "embedding": (["aclnnEmbedding"], ["aclnnEmbeddingDenseBackward"]),
    "attention": (
        ["aclnnFlashAttentionVarLenScoreV4", "aclnnLog", "aclnnAdd"],
        ["aclnnInplaceCopy", "aclnnInplaceFillScalar", "aclnnFlashAttentionUnpaddingScoreGradV4"],
    ),
}


@pytest.mark.parametrize("operator", REACHED)
def test_the_kernels_reached(operator: str, emulator: Emulator, npu: torch.device) -> None:
    name = {"sandwich_norm": "sandwich_norm-129x127-post-pre", "attention": "attention-gqa"}.get(operator)
    case = next(case for case in cases() if case.operator == operator and name in (None, case.name))
    for (function, args), expected in zip(recorded_calls(case, torch.float32, npu), REACHED[operator], strict=True):
        with emulator.record() as calls:
            function(*args)
        assert [call.name for call in calls] == expected


def test_the_kernels_reached_by_linear_cross_entropy(emulator: Emulator) -> None:
    x, weight = torch.randn(6, 8, device=NPU, requires_grad=True), torch.randn(11, 8, device=NPU, requires_grad=True)
    labels = torch.tensor([1, 2, -100, 3, 4, 0], device=NPU)
    with emulator.record() as calls:
        linear_cross_entropy(x, weight, labels, chunk_size=3)
    loss = ["aclnnClampMin", "aclnnCrossEntropyLoss", "aclnnCrossEntropyLossGrad", "aclnnInplaceCopy"]
    loss += ["aclnnEqScalar", "aclnnInplaceMaskedFillScalar", "aclnnInplaceCopy"]
    chunk = ["aclnnMm", *loss, "aclnnMm", "aclnnAddmm"]
    weights = ["aclnnEqScalar", "aclnnBitwiseNot", "aclnnInplaceCopy"]
    assert [call.name for call in calls] == [*weights, *chunk, *chunk, "aclnnDot"]


def test_the_kernels_reached_by_adamw(emulator: Emulator, npu: torch.device) -> None:
    states = [test_adamw.tensors(npu) for _ in range(4)]
    with emulator.record() as calls:
        adamw(*states, step=2, grad_scale=torch.tensor(0.5, device=NPU), **test_adamw.HYPERPARAMETERS)
    each = ["aclnnSubs", "aclnnApplyAdamWV2"]
    count = len(test_adamw.SHAPES)
    assert [call.name for call in calls] == ["aclnnInplaceMul"] * count + ["aclnnInplaceFillScalar"] + each * count


# ---- documented limits: the unfused form runs instead, and says so once


def unfused(emulator: Emulator, case: Callable[..., Any], inputs: list[Any], fused: str) -> None:
    """Twice on the NPU as on the CPU, without the fused kernel."""
    expected = outputs_and_gradients(case, [in_fp64(x) for x in inputs])
    for _ in range(2):
        with emulator.record() as calls:
            actual = outputs_and_gradients(case, inputs)
        for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
            assert_near(a.cpu(), b, 1e-5)
        assert fused not in {call.name for call in calls}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 2, 896), "rope runs unfused on the NPU, slower: x has a head dimension of 896, the fused one takes up to"),
        ((2, 1000, 4), "rope runs unfused on the NPU, slower: x has 1000 heads, the fused one takes up to 999"),
    ],
)
def test_rope_beyond_a_limit(
    shape: tuple[int, ...], message: str, emulator: Emulator, said: Callable[[], list[str]]
) -> None:
    make = Maker(torch.float32, torch.device(NPU), True)
    tables = [make.constant(shape[0], shape[2]) for _ in range(2)]
    unfused(emulator, rope, [make.normal(*shape), *tables], "aclnnRotaryPositionEmbeddingV2")
    check_said(said, message)


@pytest.mark.parametrize(
    ("heads", "head_dim", "message"),
    [
        (2, 776, "q or k has a head dimension of 776, the fused one takes up to 768"),
        (257, 2, "q or k has a number of heads of 257, the fused one takes up to 256"),
    ],
)
def test_attention_beyond_a_limit(
    heads: int, head_dim: int, message: str, emulator: Emulator, said: Callable[[], list[str]]
) -> None:
    make = Maker(torch.float32, torch.device(NPU), True)
    q, k, v = (make.normal(3, count, head_dim) for count in (heads, 1, 1))
    ends = boundaries(1, 2)
    unfused(
        emulator,
        lambda q, k, v: attention(q, k, v, ends, ends, 0.1),
        [q, k, v],
        "aclnnFlashAttentionVarLenScoreV4",
    )
    check_said(said, f"attention runs unfused on the NPU, slower: {message}")


def test_a_document_longer_than_the_limit(
    emulator: Emulator, said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_ascend, "MAX_TOKENS", 4)
    case = next(case for case in cases() if case.name == "attention-chunked_prefill")
    unfused(emulator, case.function, case.inputs(torch.float32, NPU), "aclnnFlashAttentionVarLenScoreV4")
    check_said(
        said, "attention runs unfused on the NPU, slower: q or k has a document length of 6, the fused one takes"
    )


def test_fp64(said: Callable[[], list[str]]) -> None:
    """Which an NPU may refuse or compute in fp32, but not this code."""
    swiglu(torch.ones(2, 4, dtype=torch.float64, device=NPU))
    check_said(said, "swiglu runs unfused on the NPU, slower: x is float64, the fused one takes fp32, bf16 and fp16")


def check_said(said: Callable[[], list[str]], message: str) -> None:
    (said_once,) = said()
    assert said_once.startswith(message)


# ---- bad input


@pytest.mark.parametrize("name", [name for name in test_bad_inputs.BAD if name not in ("loss range", "loss negative")])
def test_bad_input_is_refused_before_the_device_is_touched(
    name: str, monkeypatch: pytest.MonkeyPatch, emulator: Emulator
) -> None:
    """As on the CPU, but for labels out of range: to look at them an NPU would have to stop."""
    for constant in ("X", "HEADS", "GAIN", "LABELS"):
        monkeypatch.setattr(test_bad_inputs, constant, getattr(test_bad_inputs, constant).to(NPU))
    monkeypatch.setattr(test_bad_inputs, "FILTER", tuple(weight.to(NPU) for weight in test_bad_inputs.FILTER))
    call, error, message = test_bad_inputs.BAD[name]
    on_npu = message.replace("on cpu", "on (npu:0|cpu)")
    with emulator.record() as calls, pytest.raises(error, match=on_npu):
        call()
    making_arguments = {"aclnnInplaceCopy", "aclnnInplaceZero", "aclnnAdds", "aclnnCast"}
    assert {call.name for call in calls} <= making_arguments


def test_launches_per_layer(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    """Counts of launches know no noise: the benchmark's target, and what a Pangu Ultra layer takes today."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    launch_count = importlib.import_module("launch_count")
    rows = {(row["layer"], row["mode"]): row for row in launch_count.count(emulator)}
    assert all(row["ratio"] is None or row["ratio"] <= launch_count.TARGET for row in rows.values())
    ultra = rows["Pangu, sandwich norm", "bf16"]
    assert ultra["forward"] <= 16
    assert ultra["backward"] <= 28
    published = [row for (name, _), row in rows.items() if not name.startswith("Pangu")]
    assert all(rows["Pangu, pre-norm", "bf16"]["total"] < row["total"] for row in published)
