"""The SwiGLU feed-forward layer (Shazeer 2020)."""

from pangu_kernels import swiglu
from torch import Tensor, nn

from pangu.config import ModelConfig
from pangu.model.linear import Linear


class FeedForward(nn.Module):
    """`W_down (silu(W_gate x) * W_up x)` over `[T, H]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, bias = config.intermediate_size, config.feed_forward_bias
        self.gate_up_proj = Linear(config.hidden_size, 2, size, bias=bias)
        self.down_proj = Linear(size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))
