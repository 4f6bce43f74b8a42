"""Fused operators of the transformer: one folder per operator, one `torch.library` schema, several devices."""

from pangu_kernels.adamw import adamw
from pangu_kernels.attention import attention
from pangu_kernels.embedding import embedding
from pangu_kernels.linear_cross_entropy import linear_cross_entropy
from pangu_kernels.local_filter import local_filter
from pangu_kernels.rms_norm import rms_norm
from pangu_kernels.rope import rope
from pangu_kernels.sandwich_norm import sandwich_norm
from pangu_kernels.squared_norm import squared_norm
from pangu_kernels.swiglu import swiglu
from pangu_kernels.weight_gradient import add_weight_gradient, weight_gradient

__all__ = [
    "adamw",
    "add_weight_gradient",
    "attention",
    "embedding",
    "linear_cross_entropy",
    "local_filter",
    "rms_norm",
    "rope",
    "sandwich_norm",
    "squared_norm",
    "swiglu",
    "weight_gradient",
]
