"""LFA against a transcription of Yuan 2.0's equations, and what every row of its ablation must keep to."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import LOCAL_FILTERS, boundaries, documents, gradients, random_model, small_config, stream
from torch import Tensor
from torch.nn import functional as F

from pangu.model.attention import Attention
from pangu.model.local_filter import ExponentialMovingAverage
from pangu.model.rope import rotary_tables


def conv2d_causal(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Kernel (taps, 1) over [1, channels, tokens, 1], padded at both ends and cut: x and result [T, channels]."""
    taps = weight.shape[-1]
    image = x.T[None, :, :, None]
    return F.conv2d(image, weight[..., None], bias, padding=(taps - 1, 0))[0, :, : len(x), 0].T


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain


def yuan_attention(x: Tensor, weights: dict[str, Tensor], heads: int, head_dim: int) -> Tensor:
    """Yuan 2.0, figures 1 and 2, one document [S, H]: values from x; z = norm(conv2(conv1(x)) + x); queries and keys of
    a head next to one another in W_qk z; rotary; softmax."""
    v = (x @ weights["v_proj.weight"].T).view(len(x), heads, head_dim)
    y = conv2d_causal(x, weights["local_filter.weight1"], weights["local_filter.bias1"])
    y = conv2d_causal(y, weights["local_filter.weight2"], weights["local_filter.bias2"])
    z = rms_norm(y + x, weights["local_filter.norm.weight"], 1e-6)
    w_qk = weights["qk_proj.weight"].reshape(heads * 2 * head_dim, -1)
    q, k = (z @ w_qk.T).view(len(x), heads, 2 * head_dim).split(head_dim, dim=-1)

    angles = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)

    def rotate(vectors: Tensor) -> Tensor:
        pairs = torch.complex(*vectors.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / math.sqrt(head_dim)
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out.flatten(1) @ weights["output_proj.weight"].T


def test_lfa_equals_the_published_equations() -> None:
    config = small_config(local_filter="two_convolutions_norm", norm_eps=1e-6)
    attention = random_model(config).layers["1"].get_submodule("attention")
    assert isinstance(attention, Attention)
    lengths = [1, 2, 7, 3]
    cu_seqlens = boundaries(lengths)
    x = torch.randn(sum(lengths), config.hidden_size, generator=torch.Generator().manual_seed(3), requires_grad=True)
    cos, sin = rotary_tables(torch.cat([torch.arange(n) for n in lengths]), config.head_dim, config.rope_base)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))

    out = attention(x, cos, sin, cu_seqlens)
    out.backward(direction)
    found, found_x = gradients(attention), x.grad
    attention.zero_grad()
    x.grad = None
    weights = dict(attention.named_parameters())
    expected = torch.cat([yuan_attention(x[span], weights, 6, config.head_dim) for span in documents(cu_seqlens)])
    expected.backward(direction)

    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_x, x.grad, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(attention).items():
        torch.testing.assert_close(found[name], gradient, atol=3e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("taps", [1, 2, 3, 7])
def test_single_convolution_equals_conv2d(taps: int) -> None:
    config = small_config(local_filter=f"convolution_{taps}")
    local_filter = random_model(config).layers["0"].get_submodule("attention.local_filter")
    lengths = [1, 9, 2]
    x = torch.randn(12, 36, generator=torch.Generator().manual_seed(0))
    out = local_filter(x, boundaries(lengths))
    weight, bias = local_filter.get_parameter("weight"), local_filter.get_parameter("bias")
    expected = torch.cat([conv2d_causal(x[span], weight, bias) for span in documents(boundaries(lengths))])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_two_convolutions_are_lfa_without_its_norm() -> None:
    normed = random_model(small_config(local_filter="two_convolutions_norm")).layers["0"].get_submodule("attention")
    plain = random_model(small_config(local_filter="two_convolutions")).layers["0"].get_submodule("attention")
    plain.load_state_dict({name: value for name, value in normed.state_dict().items() if "norm" not in name})
    x = torch.randn(8, 36, generator=torch.Generator().manual_seed(0))
    gain = normed.get_parameter("local_filter.norm.weight")
    out = plain.get_submodule("local_filter")(x, boundaries([8]))
    expected = normed.get_submodule("local_filter")(x, boundaries([8]))
    torch.testing.assert_close(rms_norm(out, gain, 1e-5), expected, atol=1e-5, rtol=1e-5)


def test_moving_average_equals_its_recurrence() -> None:
    config = small_config(local_filter="exponential_moving_average")
    ema = random_model(config).layers["0"].get_submodule("attention.local_filter")
    assert isinstance(ema, ExponentialMovingAverage)
    lengths = [1, 11, 5]
    x = torch.randn(17, 36, generator=torch.Generator().manual_seed(0))
    alpha, delta = ema.alpha.sigmoid(), ema.delta.sigmoid()
    rows = []
    for span in documents(boundaries(lengths)):
        state = torch.zeros(36, 16)
        for token in x[span]:
            state = alpha * ema.beta * token[:, None] + (1 - alpha * delta) * state
            rows.append(F.silu((ema.eta * state).sum(-1) / 4 + ema.omega * token))
    torch.testing.assert_close(ema(x, boundaries(lengths)), torch.stack(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("local_filter", ["none", *LOCAL_FILTERS])
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
def test_a_token_changes_only_itself_and_what_follows_in_its_document(
    local_filter: str, lengths: list[int], data: st.DataObject
) -> None:
    model = random_model(small_config(local_filter=local_filter, num_layers=2))
    tokens, positions, cu_seqlens = stream(lengths)
    changed = data.draw(st.integers(0, len(tokens) - 1))
    altered = tokens.clone()
    altered[changed] = (altered[changed] + 1) % 97
    with torch.no_grad():
        before, after = model(tokens, positions, cu_seqlens), model(altered, positions, cu_seqlens)
    difference = (before - after).abs().amax(-1)
    document = next(span for span in documents(cu_seqlens) if span.start <= changed < span.stop)
    assert (difference[changed : document.stop] > 1e-4).all()
    difference[changed : document.stop] = 0
    assert difference.max() < 1e-5


@pytest.mark.parametrize("local_filter", LOCAL_FILTERS)
def test_documents_packed_equal_documents_alone(local_filter: str) -> None:
    model = random_model(small_config(local_filter=local_filter))
    tokens, positions, cu_seqlens = stream([1, 2, 8, 3])
    packed = model(tokens, positions, cu_seqlens)
    for span in documents(cu_seqlens):
        alone = model(tokens[span], positions[span], boundaries([span.stop - span.start]))
        torch.testing.assert_close(packed[span], alone, atol=1e-5, rtol=1e-5)


def test_convolutions_see_zeros_before_a_document() -> None:
    """conv1's output before the first token is 0, not conv1(0), which would be its bias."""
    local_filter = random_model(small_config(local_filter="two_convolutions")).layers["0"].attention.local_filter
    x = torch.randn(1, 36, generator=torch.Generator().manual_seed(0))
    inner = local_filter.weight1[..., 1] @ x[0] + local_filter.bias1
    expected = local_filter.weight2[..., 1] @ inner + local_filter.bias2 + x[0]
    torch.testing.assert_close(local_filter(x, boundaries([1]))[0], expected, atol=1e-5, rtol=1e-5)
