"""Gradients of weights: in fp32 from activations in half precision, added where they belong."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pangu_kernels import add_weight_gradient, weight_gradient
from pangu_kernels.weight_gradient import Destination, ascend, reference
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from pangu.device.cann_emulator import emulated_npu

SHAPES = [(1, 1, 1), (3, 8, 5), (129, 33, 127)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def operands(tokens: int, outputs: int, inputs: int, dtype: torch.dtype, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(tokens, outputs).to(device, dtype), torch.randn(tokens, inputs).to(device, dtype)


def product(d_y: Tensor, x: Tensor) -> Tensor:
    return d_y.cpu().double().T @ x.cpu().double()


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


# ---- the operators


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_product_in_fp64(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    d_y, x = operands(*shape, dtype, device)
    wide = torch.promote_types(dtype, torch.float32)
    gradient = weight_gradient(d_y, x, wide)
    assert gradient.dtype == wide
    assert_near(gradient, product(d_y, x))
    assert_near(weight_gradient(d_y, x, torch.bfloat16), product(d_y, x), 4e-3)
    accumulator = torch.ones_like(gradient)
    add_weight_gradient(accumulator, d_y, x)
    assert_near(accumulator, product(d_y, x) + 1)


def test_nothing_is_rounded_to_the_activations_digits() -> None:
    """1 + 2^-12 has more digits than bf16, and both of its parts are exact in it."""
    d_y, x = torch.tensor([[1.0], [2.0**-12]]).bfloat16(), torch.ones(2, 1).bfloat16()
    assert weight_gradient(d_y, x, torch.float32).item() == 1 + 2.0**-12
    accumulator = torch.full((1, 1), 2.0**-13)
    add_weight_gradient(accumulator, d_y, x)
    assert accumulator.item() == 1 + 2.0**-12 + 2.0**-13


def test_no_tokens() -> None:
    d_y, x = operands(0, 3, 2, torch.bfloat16)
    assert torch.equal(weight_gradient(d_y, x, torch.float32), torch.zeros(3, 2))


def test_opcheck(device: torch.device) -> None:
    d_y, x = operands(3, 8, 5, torch.bfloat16, device)
    torch.library.opcheck(torch.ops.pangu.weight_gradient.default, (d_y, x, torch.float32))
    torch.library.opcheck(torch.ops.pangu.add_weight_gradient.default, (torch.zeros(8, 5, device=device), d_y, x))


def test_fake_tensors_have_the_real_layout() -> None:
    d_y, x = operands(3, 8, 5, torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = weight_gradient(mode.from_tensor(d_y), mode.from_tensor(x), torch.float32)
    assert (fake.shape, fake.dtype, fake.stride()) == ((8, 5), torch.float32, (5, 1))
    assert weight_gradient(d_y.to("meta"), x.to("meta"), torch.float32).is_meta


D_Y, X = operands(3, 8, 5, torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: weight_gradient(D_Y, X[0], torch.float32), ValueError, "weight_gradient: x must have 2 dimensions"),
        (lambda: weight_gradient(D_Y[:2], X, torch.float32), ValueError, r"d_y must have shape \[3, 8\].*\[2, 8\]"),
        (lambda: weight_gradient(D_Y.float(), X, torch.float32), TypeError, "d_y must be bfloat16, got float32"),
        (lambda: weight_gradient(D_Y.int(), X, torch.float32), TypeError, "d_y must be fp32.*got int32"),
        (lambda: weight_gradient(D_Y.to("meta"), X, torch.float32), ValueError, "d_y must be on cpu"),
        (
            lambda: add_weight_gradient(torch.zeros(5, 8), D_Y, X),
            ValueError,
            r"add_weight_gradient: accumulator must have shape \[8, 5\]",
        ),
        (
            lambda: add_weight_gradient(torch.zeros(8, 5).bfloat16(), D_Y, X),
            TypeError,
            "accumulator must be torch.float32, got torch.bfloat16",
        ),
        (
            lambda: add_weight_gradient(torch.zeros(5, 8).T, D_Y, X),
            ValueError,
            "accumulator must be contiguous",
        ),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- where gradients go


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.destination = Destination(weight)
        return x @ weight.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, None]:
        gradient = ctx.destination.gradient(d_y, *ctx.saved_tensors)
        RETURNED.append(gradient is not None)
        return gradient, None


RETURNED: list[bool] = []


@pytest.fixture
def returned() -> list[bool]:
    """For every backward pass so far, whether the gradient was given back to autograd."""
    RETURNED.clear()
    return RETURNED


def parameter(*shape: int) -> nn.Parameter:
    torch.manual_seed(1)
    return nn.Parameter(torch.randn(*shape))


@pytest.mark.parametrize("shape", [(8, 5), (2, 4, 5)])
def test_from_the_second_micro_batch_on_gradients_are_added_in_place(shape: Any, returned: list[bool]) -> None:
    weight = parameter(*shape)
    for micro_batches in (1, 2, 3):
        before = weight.grad
        Product.apply(weight.flatten(0, -2), X).backward(D_Y)
        assert before is None or weight.grad is before
        assert_near(weight.grad.view(8, 5), micro_batches * product(D_Y, X))
    assert returned == [True, False, False]


def test_fp32_activations_take_autograds_way_to_the_bit(returned: list[bool]) -> None:
    weight = parameter(8, 5)
    for _ in range(2):
        Product.apply(weight, X.float()).backward(D_Y.float())
    gradient = D_Y.float().T @ X.float()
    assert torch.equal(weight.grad, gradient + gradient)
    assert returned == [True, True]


def test_gradients_that_are_asked_for_are_returned(returned: list[bool]) -> None:
    weight, x = parameter(8, 5), X.clone().requires_grad_()
    weight.grad = torch.ones(8, 5)
    (gradient,) = torch.autograd.grad(Product.apply(weight, X), weight, D_Y)
    assert_near(gradient, product(D_Y, X))
    (Product.apply(weight, X) + x @ torch.ones(5, 8).bfloat16()).backward(D_Y, inputs=[x])
    assert torch.equal(weight.grad, torch.ones(8, 5)), "neither call was to touch it"


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_see_every_gradient(register: str, returned: list[bool]) -> None:
    weight, seen = parameter(8, 5), []
    getattr(weight, register)(lambda tensor: seen.append(tensor.shape))
    for _ in range(2):
        Product.apply(weight, X).backward(D_Y)
    assert len(seen) == 2
    assert returned == [True, True]


def test_a_weight_that_was_computed_has_no_destination(returned: list[bool]) -> None:
    weight = parameter(8, 5)
    for _ in range(2):
        Product.apply(2 * weight, X).backward(D_Y)
    assert_near(weight.grad, 4 * product(D_Y, X))
    assert returned == [True, True]


def test_fp32_gradients_of_a_bf16_parameter(returned: list[bool]) -> None:
    """What FSDP's unsharded parameters can be told to have."""
    weight = nn.Parameter(parameter(8, 5).bfloat16())
    weight.grad_dtype = torch.float32
    for _ in range(2):
        Product.apply(weight, X).backward(D_Y)
    assert weight.grad.dtype == torch.float32
    assert_near(weight.grad, 2 * product(D_Y, X))
    assert returned == [True, False]


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_the_local_part_of_a_distributed_parameter(returned: list[bool]) -> None:
    mesh = init_device_mesh("cpu", (1,))
    weight = nn.Parameter(DTensor.from_local(parameter(2, 4, 5).detach(), mesh, [Shard(1)]))
    for _ in range(2):
        Product.apply(weight.to_local().flatten(0, -2), X).backward(D_Y)
    assert_near(weight.grad.to_local().view(8, 5), 2 * product(D_Y, X))
    assert returned == [True, False]


# ---- MindSpeed, by a stand-in: the real one cannot be installed without CANN

STAND_IN = '''
calls = []

def npu_matmul_add_fp32(total_input, grad_output, grad):
    """The published signature (mindspeed/ops/npu_matmul_add.py): grad [N, K] fp32 += grad_output^T total_input."""
    calls.append((tuple(total_input.shape), tuple(grad_output.shape), tuple(grad.shape)))
    grad += grad_output.float().t() @ total_input.float()
'''


@pytest.fixture
def mindspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "mindspeed" / "ops").mkdir(parents=True)
    (tmp_path / "mindspeed" / "ops" / "npu_matmul_add.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    ascend._mindspeed.cache_clear()
    yield
    ascend._mindspeed.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mindspeed"]:
        del sys.modules[name]


@pytest.mark.usefixtures("mindspeed")
def test_mindspeeds_stand_in_is_called_as_published_and_imported_only_then() -> None:
    assert "mindspeed" not in sys.modules
    accumulator, expected = torch.ones(8, 5), torch.ones(8, 5)
    ascend.add_(accumulator, D_Y, X)
    reference.add_(expected, D_Y, X)
    assert_near(accumulator, expected.double())
    assert importlib.import_module("mindspeed.ops.npu_matmul_add").calls == [((3, 5), (3, 8), (8, 5))]


@pytest.mark.usefixtures("mindspeed")
def test_mindspeed_is_not_asked_for_what_it_does_not_take() -> None:
    accumulator = torch.ones(8, 5)
    ascend.add_(accumulator, D_Y.float(), X.float())
    assert_near(accumulator, product(D_Y, X) + 1)
    assert "mindspeed" not in sys.modules


@pytest.mark.usefixtures("mindspeed")
def test_a_mindspeed_that_does_not_load_is_said_once_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mindspeed" / "__init__.py").write_text("import megatron_that_is_not_there")
    for _ in range(2):
        assert ascend._mindspeed() is None
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "MindSpeed is installed but does not load"
    ]


# ---- on the NPU


@pytest.mark.ascend
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_product_on_an_emulated_npu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    with emulated_npu():
        test_equals_the_product_in_fp64(shape, dtype, torch.device("npu:0"))


@pytest.mark.ascend
def test_kernels_reached_on_an_emulated_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_npu() as emulator:
        d_y, x, accumulator = D_Y.npu(), X.npu(), torch.zeros(8, 5).npu()
        with emulator.record() as calls:
            add_weight_gradient(accumulator, d_y, x)
        assert [call.name for call in calls] == ["aclnnInplaceFillScalar", "aclnnGroupedMatmulAdd"]
        with emulator.record() as calls:
            weight_gradient(d_y, x, torch.float32)
        assert [call.name for call in calls] == ["aclnnMm"]
        monkeypatch.setattr(ascend, "_WIDEST", 7)
        with emulator.record() as calls:
            add_weight_gradient(accumulator, d_y, x)
        assert [call.name for call in calls] == ["aclnnMm", "aclnnInplaceAdd"]
        assert_near(accumulator, 2 * product(D_Y, X))


@pytest.mark.ascend
@pytest.mark.usefixtures("mindspeed")
def test_mindspeeds_stand_in_on_an_emulated_npu() -> None:
    with emulated_npu():
        accumulator = torch.ones(8, 5).npu()
        add_weight_gradient(accumulator, D_Y.npu(), X.npu())
        assert_near(accumulator, product(D_Y, X) + 1)
        assert len(importlib.import_module("mindspeed.ops.npu_matmul_add").calls) == 1
