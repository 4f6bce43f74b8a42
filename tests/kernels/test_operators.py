"""What holds for every operator: its numbers, its gradients, and that PyTorch's machinery can handle it."""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from operator_cases import Case, cases
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CASES = [pytest.param(case, id=case.name) for case in cases()]
ONE_PER_OPERATOR = [
    pytest.param(case, id=operator) for operator, case in sorted({case.operator: case for case in cases()}.items())
]
# Of the largest value. bf16 keeps 8 bits, fp16 11; local_filter rounds between its convolutions.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 2.5e-2}


def tensors(function: Any, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """What `function` returns, without the Nones."""
    result = function(*inputs)
    return tuple(y for y in (result if isinstance(result, tuple) else (result,)) if y is not None)


def outputs_and_gradients(function: Any, inputs: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """All tensors `function` returns, and the gradients of their weighted sum by every input that asks for one."""
    outputs = tensors(function, inputs)
    differentiable = [y for y in outputs if y.requires_grad]
    weights = [torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype) for y in differentiable]
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return outputs, torch.autograd.grad(differentiable, wanted, weights)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), expected.double().to(actual.device), rtol=0, atol=tolerance * max(scale, 1.0)
    )


def in_fp64(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().cpu().requires_grad_(x.requires_grad)
    return x.cpu() if isinstance(x, Tensor) else x


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_expression_in_fp64(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cpu" and dtype == torch.float64:
        pytest.skip("accelerators compute in fp32 at most")
    inputs = case.inputs(dtype, device)
    outputs, gradients = outputs_and_gradients(case.function, inputs)
    expected, expected_gradients = outputs_and_gradients(case.plain, [in_fp64(x) for x in inputs])
    for actual, wanted in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        assert_near(actual, wanted, TOLERANCES[dtype])
    statistics = torch.promote_types(dtype, torch.float32)
    assert all(y.dtype in (dtype, statistics) and y.is_contiguous() for y in outputs)
    assert [g.dtype for g in gradients] == [dtype] * len(gradients)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    if sum(x.numel() for x in inputs if isinstance(x, Tensor)) > 300:
        pytest.skip("numerical differentiation of a large input takes long; the smaller sizes do it")
    assert torch.autograd.gradcheck(lambda *inputs: tensors(case.function, inputs), inputs)


@pytest.mark.parametrize("case", CASES)
def test_same_without_gradients(case: Case, device: torch.device) -> None:
    inputs = case.inputs(torch.float32, device)
    expected, _ = outputs_and_gradients(case.function, inputs)
    with torch.no_grad():
        outputs = tensors(case.function, inputs)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert not actual.requires_grad
        assert torch.equal(actual, wanted)


class Recorder(TorchDispatchMode):
    """The calls of our operators, from forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pangu":
            copies = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)
            self.calls.append((func, copies))
        return func(*args, **(kwargs or {}))


def recorded_calls(case: Case, dtype: torch.dtype, device: torch.device) -> list[tuple[Any, tuple[Any, ...]]]:
    with Recorder() as recorder:
        outputs_and_gradients(case.function, case.inputs(dtype, device))
    names = [operator.name() for operator, _ in recorder.calls]
    assert names == [f"pangu::{case.operator}", f"pangu::{case.operator}_backward"]
    return recorder.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Of this device's kernels, on the very arguments they get, saved statistics included."""
    reference = importlib.import_module(f"pangu_kernels.{case.operator}.reference")
    for (operator, args), function in zip(
        recorded_calls(case, dtype, device), (reference.forward, reference.backward), strict=True
    ):
        expected_args = [x.clone() if isinstance(x, Tensor) else x for x in args]
        expected, actual = function(*expected_args), operator(*args)
        for a, b in zip(tree_leaves((actual, args)), tree_leaves((expected, expected_args)), strict=True):
            if isinstance(b, Tensor):
                assert layout(a) == layout(b)
                assert_near(a, b, TOLERANCES[dtype])


@pytest.mark.parametrize("case", ONE_PER_OPERATOR)
def test_opcheck(case: Case, device: torch.device) -> None:
    for operator, args in recorded_calls(case, torch.float32, device):
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_fake_tensors_have_the_real_layout(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    real = outputs_and_gradients(case.function, inputs)
    with FakeTensorMode() as mode:
        fake_inputs = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]
        fake = outputs_and_gradients(case.function, fake_inputs)
    assert [[layout(x) for x in xs] for xs in fake] == [[layout(x) for x in xs] for xs in real]


def layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.stride()


@pytest.mark.parametrize("case", ONE_PER_OPERATOR)
def test_runs_on_meta(case: Case) -> None:
    outputs, gradients = outputs_and_gradients(case.function, case.inputs(torch.bfloat16, "meta"))
    assert all(x.is_meta for x in (*outputs, *gradients))


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("case", ONE_PER_OPERATOR)
def test_compiles_into_one_graph(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    expected = outputs_and_gradients(case.function, inputs)
    actual = outputs_and_gradients(torch.compile(case.function, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ONE_PER_OPERATOR)
def test_selective_checkpoint_sees_one_operator(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    seen: list[str] = []

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator.namespace == "pangu" and not context.is_recompute:
            seen.append(operator.name())
        return CheckpointPolicy.PREFER_RECOMPUTE

    def recomputed(*inputs: Any) -> Any:
        return checkpoint(
            case.function, *inputs, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )

    expected = outputs_and_gradients(case.function, inputs)
    actual = outputs_and_gradients(recomputed, inputs)
    assert seen == [f"pangu::{case.operator}"]
    for a, b in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)
