"""Tensor parallelism (Shoeybi et al. 2019), with the residual stream sharded over tokens (Korthikanti et al. 2022).

    attention, feed-forward   inputs: columns (heads, width) dealt over ranks; all tokens gathered before the matmul
                              output: rows dealt over ranks; the sum scattered over tokens after it
    embedding, head, loss     the vocabulary dealt over ranks (vocabulary.py)
    LFA                       the half-width channels between its two convolutions dealt over ranks
    everything else           the same on every rank

With sequence parallelism a rank's residual stream is `[T/t, H]`; without, every rank has all of it and the collectives
are all-reduces. What a replicated parameter's gradient then is, a part of a sum or the whole, `partial_gradients` says:
`pangu.parallel.gradients` adds the parts up once per step, in one all-reduce (our reading of the "BOA" that the Pangu
Ultra press material names and no paper defines).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from pangu_kernels.overlap import (
    all_gather_matmul,
    all_gather_rows,
    copy_to_group,
    matmul_reduce_scatter,
    reduce_from_group,
    reduce_scatter_rows,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from pangu.config import ModelConfig, ParallelConfig
from pangu.model import Transformer
from pangu.model.attention import Attention
from pangu.model.feed_forward import FeedForward
from pangu.model.linear import Linear, project
from pangu.model.local import local
from pangu.model.local_filter import TwoConvolutions
from pangu.parallel import vocabulary

_SHARDED_DIMENSION = {
    "q_proj.weight": 0,
    "q_proj.bias": 0,
    "kv_proj.weight": 1,  # [2, heads * head_dim, H]
    "kv_proj.bias": 1,
    "qk_proj.weight": 0,  # [heads, 2, head_dim, H]
    "qk_proj.bias": 0,
    "v_proj.weight": 0,
    "v_proj.bias": 0,
    "output_proj.weight": 1,
    "gate_up_proj.weight": 1,  # [2, F, H]
    "gate_up_proj.bias": 1,
    "down_proj.weight": 1,
    "local_filter.weight1": 0,
    "local_filter.bias1": 0,
    "local_filter.weight2": 1,
    "embedding.weight": 0,
    "head.weight": 0,
}


@dataclass(frozen=True)
class TensorParallel:
    """How the layers of a model communicate."""

    group: dist.ProcessGroup
    parallel: ParallelConfig
    config: ModelConfig

    @property
    def shares_key_heads(self) -> bool:
        """Whether there are fewer key heads than ranks, so that several ranks compute with the same one."""
        return self.config.num_key_value_heads < self.group.size()

    def gather(self, x: Tensor) -> Tensor:
        """All tokens `[T, H]` of the residual stream's share x; gradients of all ranks' uses of them are summed."""
        return (all_gather_rows if self.parallel.sequence_parallel else copy_to_group)(x, self.group)

    def reduce(self, x: Tensor) -> Tensor:
        """The residual stream's share of the sum over ranks of x `[T, H]`."""
        return (reduce_scatter_rows if self.parallel.sequence_parallel else reduce_from_group)(x, self.group)

    def project_inputs(self, x: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
        """`pangu.model.linear.project_inputs` of all tokens, with this rank's columns of every weight."""
        weights = [self._columns(linear.weight) for linear in linears]
        if self.parallel.sequence_parallel:
            products = all_gather_matmul(x, weights, self.group, deferred=linears[0].deferred, **self._overlap)
        else:
            gathered = copy_to_group(x, self.group)
            products = [project(gathered, weight, deferred=linears[0].deferred) for weight in weights]
        biases = [None if linear.bias is None else self._columns(linear.bias, 1) for linear in linears]
        return [y if bias is None else y + bias.to(y.dtype) for y, bias in zip(products, biases, strict=True)]

    def project_output(self, x: Tensor, linear: Linear) -> Tensor:
        """`pangu.model.linear.project_output`, summed over ranks; the bias is added once, to the sum."""
        weight = local(linear.weight)
        if self.parallel.sequence_parallel:
            y = matmul_reduce_scatter(x, weight, self.group, deferred=linear.deferred, **self._overlap)
        else:
            y = reduce_from_group(project(x, weight, deferred=linear.deferred), self.group)
        return y if linear.bias is None else y + local(linear.bias).to(y.dtype)

    def convolve(
        self,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        cu_seqlens: Tensor,
        *,
        inner: Callable[..., Tensor],
    ) -> Tensor:
        """`pangu_kernels.local_filter` of all tokens with this rank's half-width channels, summed over ranks."""
        y = inner(self.gather(x), weight1, bias1, weight2, bias2.new_zeros(bias2.shape), cu_seqlens)
        return self.reduce(y) + bias2.to(x.dtype)

    def _columns(self, parameter: Tensor, bias: int = 0) -> Tensor:
        """This rank's output columns of a weight as `[N, H]`, or of a bias (1 dimension fewer) as `[N]`."""
        tensor = local(parameter)
        if self.shares_key_heads and tensor.dim() == 3 - bias and _is_replicated(parameter):
            head = self.group.rank() * self.config.num_key_value_heads // self.group.size()
            tensor = tensor.narrow(1, head * self.config.head_dim, self.config.head_dim)
        return tensor.flatten() if bias else tensor.flatten(0, -2)

    @property
    def _overlap(self) -> dict[str, Any]:
        return {"mode": self.parallel.overlap, "num_chunks": self.parallel.overlap_chunks}


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """Turn every parameter of `model` (on the meta device) into a DTensor on the tp mesh, and its layers into ones that
    communicate over it."""
    group = mesh.get_group()
    tensor_parallel = TensorParallel(group, parallel, model.config)
    for name, parameter in list(model.named_parameters()):
        owner, _, kind = name.rpartition(".")
        placement = parameter_placement(name, model.config, mesh.size())
        setattr(model.get_submodule(owner), kind, nn.Parameter(_distribute(parameter, mesh, placement)))
    for module in model.modules():
        if isinstance(module, Attention | FeedForward):
            module.project_inputs = tensor_parallel.project_inputs
            module.project_output = tensor_parallel.project_output
        if isinstance(module, TwoConvolutions):
            module.convolve = partial(tensor_parallel.convolve, inner=module.convolve)
    vocabulary.apply_vocabulary_parallel(model, group, tensor_parallel.gather, tensor_parallel.reduce)


def parameter_placement(name: str, config: ModelConfig, tp: int) -> Placement:
    """Of the parameter with this global name on the tp dimension."""
    key = ".".join(name.split(".")[-2:])
    if key not in _SHARDED_DIMENSION or (key.startswith("kv_proj") and config.num_key_value_heads < tp):
        return Replicate()
    return Shard(_SHARDED_DIMENSION[key])


def partial_gradients(name: str, config: ModelConfig, parallel: ParallelConfig) -> bool:
    """Whether the gradient of a parameter that every tp rank holds is only this rank's part of a sum."""
    if not parameter_placement(name, config, parallel.tp).is_replicate():
        return False
    return parallel.sequence_parallel or ".kv_proj." in name


def _distribute(parameter: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    shape = list(parameter.shape)
    if isinstance(placement, Shard):
        shape[placement.dim] //= mesh.size()
    shard = parameter.new_empty(shape)
    return DTensor.from_local(
        shard, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _is_replicated(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and all(placement.is_replicate() for placement in parameter.placements)
