import pytest
import torch
from pangu_kernels import adamw
from pangu_kernels.adamw import reference
from torch import Tensor

SHAPES = ((5, 3), (1,), (127,), (2, 3, 4))
HYPERPARAMETERS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def tensors(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in SHAPES]


def zeros_like(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(0.25), torch.tensor(1.0)], ids=str)
def test_equals_pytorch(scale: float | Tensor, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    params = tensors(device, dtype)
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    exp_avgs, exp_avg_sqs = zeros_like(params), zeros_like(params)
    for step in range(1, 6):
        grads = tensors(device, dtype)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad * float(scale)
        optimizer.step()
        on_device = scale.to(device) if isinstance(scale, Tensor) else scale
        adamw(params, grads, exp_avgs, exp_avg_sqs, step=step, grad_scale=on_device, **HYPERPARAMETERS)
    for ours, parameter in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_equals_the_reference(scale: float | None, device: torch.device) -> None:
    torch.manual_seed(0)
    state = [tensors(device), tensors(device), tensors(device), [t.abs() for t in tensors(device)]]
    expected = [[t.clone() for t in kind] for kind in state]
    grad_scale = None if scale is None else torch.tensor(scale, device=device)
    reference.step_(*expected, grad_scale, 3, *HYPERPARAMETERS.values())
    torch.ops.pangu.adamw(*state, grad_scale, 3, *HYPERPARAMETERS.values())
    for kind in (0, 2, 3):  # not the gradients, which are scratch
        for actual, wanted in zip(state[kind], expected[kind], strict=True):
            torch.testing.assert_close(actual, wanted)


def test_updates_parameters_that_require_gradients(device: torch.device) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    adamw(
        [parameter],
        [torch.ones(3, device=device)],
        *([torch.zeros(3, device=device)] for _ in range(2)),
        step=1,
        **HYPERPARAMETERS,
    )
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.89, device=device))


def test_operator_is_registered_properly(device: torch.device) -> None:
    state = [tensors(device) for _ in range(4)]
    args = (*state, torch.tensor(0.5, device=device), 1, *HYPERPARAMETERS.values())
    torch.library.opcheck(torch.ops.pangu.adamw.default, args, test_utils=("test_schema", "test_faketensor"))


def test_nothing_to_update() -> None:
    adamw([], [], [], [], step=1, **HYPERPARAMETERS)
