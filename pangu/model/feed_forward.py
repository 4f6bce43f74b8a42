"""The SwiGLU feed-forward layer (Shazeer 2020)."""

from pangu_kernels import swiglu
from torch import Tensor, nn

from pangu.config import ModelConfig
from pangu.model.linear import InputProjection, Linear, OutputProjection, project_inputs, project_output


class FeedForward(nn.Module):
    """`W_down (silu(W_gate x) * W_up x)` over `[T, H]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, bias = config.intermediate_size, config.feed_forward_bias
        self.gate_up_proj = Linear(config.hidden_size, 2, size, bias=bias)
        self.down_proj = Linear(size, config.hidden_size, bias=bias)
        self.project_inputs: InputProjection = project_inputs
        self.project_output: OutputProjection = project_output

    def forward(self, x: Tensor) -> Tensor:
        (gate_up,) = self.project_inputs(x, (self.gate_up_proj,))
        return self.project_output(swiglu(gate_up), self.down_proj)
