"""State is DTensor, compute is local."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: its shard if it is distributed, else the parameter itself.

    The gradient of the result is taken for that of the shard. Where it is only this process's part of a sum, whoever
    distributed the parameter adds the parts up.
    """
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
