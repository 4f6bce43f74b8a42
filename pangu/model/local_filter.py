"""What queries and keys see of the tokens just before their own: Yuan 2.0's LFA and the ablation of its table 1.

Every filter maps `[T, H]` to `[T, H]`, looks only backwards and never across a document's start. The published code
settles `two_convolutions_norm`; of the other rows the paper gives kernel shapes, parameter counts and losses only, so
whether they kept the residual is unconfirmed: here two_convolutions keeps it, and a single convolution replaces x.
"""

from itertools import pairwise

import torch
from pangu_kernels import local_filter
from torch import Tensor, nn
from torch.nn import functional as F

from pangu.config import ModelConfig
from pangu.model.local import local
from pangu.model.norm import RMSNorm

EMA_DIMENSIONS = 16
"""Averages per channel, MEGA's default: with it the count is the 160.6M of Yuan's table."""


def build_local_filter(config: ModelConfig) -> nn.Module | None:
    match config.local_filter:
        case "none":
            return None
        case "two_convolutions_norm":
            return TwoConvolutions(config.hidden_size, RMSNorm(config.hidden_size, config.norm_eps))
        case "two_convolutions":
            return TwoConvolutions(config.hidden_size, None)
        case "exponential_moving_average":
            return ExponentialMovingAverage(config.hidden_size)
    return Convolution(config.hidden_size, filter_context(config) + 1)


def filter_context(config: ModelConfig, unbounded: int = 0) -> int:
    """Tokens before its own that a filtered token depends on; `unbounded` where that is all of them."""
    match config.local_filter:
        case "none":
            return 0
        case "two_convolutions_norm" | "two_convolutions":
            return 2
        case "exponential_moving_average":
            return unbounded
    return int(config.local_filter.removeprefix("convolution_")) - 1


class TwoConvolutions(nn.Module):
    """LFA: `norm(conv2(conv1(x)) + x)`, H to H/2 to H channels, two taps each, nothing in between.

    Where a document starts both convolutions see zeros: conv1's output before the first token is 0, not its bias.
    """

    def __init__(self, hidden_size: int, norm: RMSNorm | None) -> None:
        super().__init__()
        half = hidden_size // 2
        self.weight1 = nn.Parameter(torch.empty(half, hidden_size, 2))
        self.bias1 = nn.Parameter(torch.empty(half))
        self.weight2 = nn.Parameter(torch.empty(hidden_size, half, 2))
        self.bias2 = nn.Parameter(torch.empty(hidden_size))
        self.norm = norm
        self.convolve = local_filter

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        weight1, bias1, weight2, bias2 = map(local, (self.weight1, self.bias1, self.weight2, self.bias2))
        y = x + self.convolve(x, weight1, bias1, weight2, bias2, cu_seqlens)
        return y if self.norm is None else self.norm(y)


class Convolution(nn.Module):
    """One causal convolution of `taps` tokens; `weight[..., -1]` multiplies the token itself."""

    def __init__(self, hidden_size: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size, taps))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.convolve = _convolution

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.convolve(x, local(self.weight), local(self.bias), cu_seqlens)


class ExponentialMovingAverage(nn.Module):
    """MEGA's damped EMA (Ma et al. 2022, section 3.1) with its residual: `silu(ema(x) + omega * x)`, per channel

        h_t = alpha * beta * x_t + (1 - alpha * delta) * h_{t-1}  (16 dimensions),   ema(x)_t = eta . h_t / sqrt(16)

    That Yuan's row took MEGA's size, residual and silu is an inference from its parameter count.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        shape = (hidden_size, EMA_DIMENSIONS)
        self.alpha = nn.Parameter(torch.empty(shape))  # logits
        self.delta = nn.Parameter(torch.empty(shape))  # logits
        self.beta = nn.Parameter(torch.empty(shape))
        self.eta = nn.Parameter(torch.empty(shape))
        self.omega = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths = [stop - start for start, stop in pairwise(cu_seqlens.tolist())]
        kernel = self._kernel(max(lengths))
        # One FFT per document: fp32, since half precision FFTs exist only for powers of two, and only on some devices.
        ema = torch.cat([_causal_convolution(piece, kernel) for piece in x.float().split(lengths)])
        return F.silu(ema + local(self.omega).float() * x).to(x.dtype)

    def _kernel(self, length: int) -> Tensor:
        """Weight of the token j places back, `[length, H]`: the recurrence unrolled."""
        alpha, beta, delta, eta = (local(p).float() for p in (self.alpha, self.beta, self.delta, self.eta))
        alpha, delta = alpha.sigmoid(), delta.sigmoid()
        amplitude = alpha * beta * eta * EMA_DIMENSIONS**-0.5  # [H, dimensions]
        ages = torch.arange(length, device=alpha.device, dtype=torch.float32)
        decay = torch.exp(ages[:, None, None] * torch.log1p(-alpha * delta))  # [length, H, dimensions]
        return torch.einsum("lhd,hd->lh", decay, amplitude)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x `[T, H]` by weight `[H, H, taps]`, with zeros before a document."""
    weight = weight.to(x.dtype)
    taps = weight.shape[-1]
    age = _position_in_document(cu_seqlens, len(x)).to(x.device)[:, None]  # [T, 1]
    y = F.linear(x, weight[..., -1], bias.to(x.dtype))
    for distance in range(1, taps):
        shifted = F.pad(x, (0, 0, distance, 0))[: len(x)]  # row t holds token t - distance
        y = y + F.linear(shifted.masked_fill(age < distance, 0), weight[..., taps - 1 - distance])
    return y


def _causal_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """`y_t = sum_j kernel_j x_{t-j}` per channel, `[S, H]`, by FFTs long enough not to wrap around."""
    length = len(x)
    spectrum = torch.fft.rfft(x, n=2 * length, dim=0) * torch.fft.rfft(kernel[:length], n=2 * length, dim=0)
    return torch.fft.irfft(spectrum, n=2 * length, dim=0)[:length]


def _position_in_document(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Distance of every token from its document's start, `[T]` on the CPU."""
    tokens = torch.arange(num_tokens, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    return tokens - cu_seqlens[document]
