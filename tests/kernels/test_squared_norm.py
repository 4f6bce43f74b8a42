import pytest
import torch
from pangu_kernels import compiled, squared_norm
from torch import Tensor


def tensors(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, device=device, dtype=dtype) for shape in ((5, 3), (), (4097,), (0, 2), (2, 3, 4))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_sum_of_squares_in_fp64(dtype: torch.dtype, device: torch.device) -> None:
    inputs = tensors(device, dtype)
    expected = sum(x.double().square().sum() for x in inputs)
    actual = squared_norm(inputs)
    assert actual.dtype == torch.float32
    rtol = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=0)


def test_of_nothing_but_empty_tensors_is_zero(device: torch.device) -> None:
    assert squared_norm([torch.empty(0, 3, device=device)]).item() == 0


def test_the_cpu_loses_nothing_on_millions_of_elements_whatever_its_threads() -> None:
    if compiled.function("squared_norm", "pii:d") is None:
        pytest.skip("no compiler")
    x = torch.randn(2**22, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(squared_norm([x]))
    torch.set_num_threads(before)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].double(), x.double().square().sum(), rtol=1e-7, atol=0)


def test_operator_is_registered_properly(device: torch.device) -> None:
    torch.library.opcheck(
        torch.ops.pangu.squared_norm.default, (tensors(device),), test_utils=("test_schema", "test_faketensor")
    )


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match="squared_norm: tensors must hold at least one"):
        squared_norm([])
    with pytest.raises(TypeError, match=r"squared_norm: tensors must be fp32.*int64"):
        squared_norm([torch.zeros(3, dtype=torch.int64)])
