import pytest
import torch
from operator_cases import boundaries
from pangu_kernels import attention


def test_takes_queries_keys_and_values_as_slices_of_one_projection(device: torch.device) -> None:
    qkv = torch.randn(9, 4 + 2 * 2, 16, device=device)
    q, k, v = qkv.split((4, 2, 2), dim=1)
    documents = boundaries(4, 5)
    out, logsumexp = attention(q, k, v, documents, documents, 0.5)
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), documents, documents, 0.5)
    assert torch.equal(out, expected[0])
    assert torch.equal(logsumexp, expected[1])


def test_documents_do_not_see_one_another(device: torch.device) -> None:
    q, k, v = torch.randn(3, 7, 2, 16, device=device)
    documents = boundaries(3, 4)
    out, _ = attention(q, k, v, documents, documents, 1.0)
    k[:3], v[:3] = 5.0, -5.0
    changed, _ = attention(q, k, v, documents, documents, 1.0)
    assert torch.equal(out[3:], changed[3:])
    assert not torch.equal(out[:3], changed[:3])


def test_one_token_at_a_time_equals_all_at_once(device: torch.device) -> None:
    q, k, v = torch.randn(3, 6, 2, 16, device=device)
    whole, _ = attention(q, k, v, boundaries(6), boundaries(6), 0.3)
    steps = [
        attention(q[t : t + 1], k[: t + 1], v[: t + 1], boundaries(1), boundaries(t + 1), 0.3)[0] for t in range(6)
    ]
    torch.testing.assert_close(torch.cat(steps), whole)


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_in_two_parts_merged_by_the_logsumexp(heads: int, device: torch.device) -> None:
    """What ring attention does: documents of 5 and 1, their keys split 3 + 2 and 1 + 0, queries see both parts."""
    q, d_out = torch.randn(2, 4, heads, 16, device=device)
    k, v = torch.randn(2, 6, 1, 16, device=device)
    queries, keys = boundaries(3, 1), boundaries(5, 1)
    parts = [([0, 1, 2, 5], boundaries(3, 1)), ([3, 4], boundaries(2, 0))]
    forward, backward = torch.ops.pangu.attention, torch.ops.pangu.attention_backward

    out, logsumexp = forward(q, k, v, queries, keys, 0.3, False)
    (first, lse1), (second, lse2) = (forward(q, k[rows], v[rows], queries, ends, 0.3, False) for rows, ends in parts)
    share = torch.sigmoid(lse2 - lse1).unsqueeze(-1)
    torch.testing.assert_close(torch.lerp(first, second, share), out)
    torch.testing.assert_close(torch.logaddexp(lse1, lse2), logsumexp)

    d_q, *d_kv = backward(d_out, q, k, v, out, logsumexp, queries, keys, 0.3, False)
    total_d_q = torch.zeros_like(q)
    for rows, ends in parts:
        part_d_q, *part_d_kv = backward(d_out, q, k[rows], v[rows], out, logsumexp, queries, ends, 0.3, False)
        total_d_q += part_d_q
        for whole, part in zip(d_kv, part_d_kv, strict=True):
            torch.testing.assert_close(part, whole[rows])
    torch.testing.assert_close(total_d_q, d_q)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens_at_all(lengths: tuple[int, ...], device: torch.device) -> None:
    q, k = torch.randn(0, 4, 16, device=device, requires_grad=True), torch.randn(0, 2, 16, device=device)
    out, logsumexp = attention(q, k, k, boundaries(*lengths), boundaries(*lengths), 1.0)
    out.sum().backward()
    assert out.shape == (0, 4, 16)
    assert logsumexp.shape == (0, 4)
    assert q.grad is not None
    assert q.grad.shape == (0, 4, 16)
