from torch import Tensor
from torch.nn.functional import silu


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up
