import pytest
import torch
from operator_cases import boundaries
from pangu_kernels import local_filter
from torch import Tensor


def weights(device: torch.device) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(shape, device=device) for shape in ((3, 6, 2), (3,), (6, 3, 2), (6,)))


def test_before_a_document_the_first_convolution_gave_zero_not_its_bias(device: torch.device) -> None:
    weight1, bias1, weight2, bias2 = weights(device)
    x = torch.randn(1, 6, device=device)
    hidden = weight1[..., 1] @ x[0] + bias1
    expected = weight2[..., 1] @ hidden + bias2
    torch.testing.assert_close(local_filter(x, weight1, bias1, weight2, bias2, boundaries(1))[0], expected)


def test_sees_two_tokens_back_and_nothing_else(device: torch.device) -> None:
    filters = weights(device)
    x = torch.randn(8, 6, device=device, requires_grad=True)
    y = local_filter(x, *filters, boundaries(2, 6))
    reached = [
        torch.autograd.grad(y[t].sum(), x, retain_graph=True)[0].any(1).nonzero().flatten().tolist() for t in range(8)
    ]
    assert reached == [[0], [0, 1], [2], [2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6, 7]]


@pytest.mark.parametrize("prompt", [1, 2, 5])
def test_decodes_from_the_last_two_tokens(prompt: int, device: torch.device) -> None:
    filters = weights(device)
    x = torch.randn(9, 6, device=device)
    whole = local_filter(x, *filters, boundaries(9))
    for t in range(prompt, 9):
        window = x[max(0, t - 2) : t + 1].contiguous()
        last = local_filter(window, *filters, boundaries(len(window)))[-1]
        torch.testing.assert_close(last, whole[t])


def test_no_tokens_at_all(device: torch.device) -> None:
    filters = [w.requires_grad_() for w in weights(device)]
    x = torch.randn(0, 6, device=device, requires_grad=True)
    local_filter(x, *filters, boundaries(0)).sum().backward()
    assert all(w.grad is not None and not w.grad.any() for w in filters)
