import pytest
import torch
from operator_cases import boundaries
from pangu_kernels import attention


def test_takes_queries_keys_and_values_as_slices_of_one_projection(device: torch.device) -> None:
    qkv = torch.randn(9, 4 + 2 * 2, 8, device=device)
    q, k, v = qkv.split((4, 2, 2), dim=1)
    documents = boundaries(4, 5)
    out, logsumexp = attention(q, k, v, documents, documents, 0.5)
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), documents, documents, 0.5)
    assert torch.equal(out, expected[0])
    assert torch.equal(logsumexp, expected[1])


def test_documents_do_not_see_one_another(device: torch.device) -> None:
    q, k, v = torch.randn(3, 7, 2, 8, device=device)
    documents = boundaries(3, 4)
    out, _ = attention(q, k, v, documents, documents, 1.0)
    k[:3], v[:3] = 5.0, -5.0
    changed, _ = attention(q, k, v, documents, documents, 1.0)
    assert torch.equal(out[3:], changed[3:])
    assert not torch.equal(out[:3], changed[:3])


def test_one_token_at_a_time_equals_all_at_once(device: torch.device) -> None:
    q, k, v = torch.randn(3, 6, 2, 8, device=device)
    whole, _ = attention(q, k, v, boundaries(6), boundaries(6), 0.3)
    steps = [
        attention(q[t : t + 1], k[: t + 1], v[: t + 1], boundaries(1), boundaries(t + 1), 0.3)[0] for t in range(6)
    ]
    torch.testing.assert_close(torch.cat(steps), whole)


def test_logsumexp_merges_two_halves_of_the_keys(device: torch.device) -> None:
    """What ring attention does with it."""
    q, k, v = torch.randn(3, 4, 1, 8, device=device)
    one = boundaries(1)
    whole, _ = attention(q[-1:], k, v, one, boundaries(4), 0.3)
    (first, lse1), (second, lse2) = (
        attention(q[-1:], k[half], v[half], one, boundaries(2), 0.3) for half in (slice(0, 2), slice(2, 4))
    )
    share = torch.sigmoid(lse1 - lse2).unsqueeze(-1)
    torch.testing.assert_close(share * first + (1 - share) * second, whole)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens_at_all(lengths: tuple[int, ...], device: torch.device) -> None:
    q, k = torch.randn(0, 4, 8, device=device, requires_grad=True), torch.randn(0, 2, 8, device=device)
    out, logsumexp = attention(q, k, k, boundaries(*lengths), boundaries(*lengths), 1.0)
    out.sum().backward()
    assert out.shape == (0, 4, 8)
    assert logsumexp.shape == (0, 4)
    assert q.grad is not None
    assert q.grad.shape == (0, 4, 8)
