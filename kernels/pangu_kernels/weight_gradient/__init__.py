"""The gradient of a linear layer's weight: in fp32 where that is what it is accumulated in, and added in place."""

from pangu_kernels.weight_gradient.destination import Destination
from pangu_kernels.weight_gradient.operators import add_weight_gradient, weight_gradient

__all__ = ["Destination", "add_weight_gradient", "weight_gradient"]
