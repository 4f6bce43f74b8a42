"""Data parallelism: FSDP2 over the ranks that see other tokens, as ZeRO 1, 2 or 3 (Rajbhandari et al. 2020)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state
from torch.distributed.tensor import Shard

from pangu.model import Transformer
from pangu.model.local import local
from pangu.parallel.mesh import Mesh


def apply_fsdp(model: Transformer, mesh: Mesh, zero_stage: Literal[1, 2, 3]) -> None:
    """Shard every block, and what is outside the blocks, over the mesh's dp_replicate and fsdp dimensions.

    Parameters, optimizer state and gradients are fp32; parameters are gathered in the model's compute dtype. Only with
    `zero_stage` 3 are they freed between forward and backward, and again after backward.
    """
    hybrid = mesh.layout.dp_replicate > 1
    sub_mesh = mesh.state["dp_replicate", "fsdp"] if hybrid else mesh.state["fsdp"]
    half = model.compute_dtype if model.compute_dtype is not torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(_shard_dimension(local(parameter).shape, mesh.fsdp_size))

    for module in (*model.layers.values(), model):
        fully_shard(
            module,
            mesh=sub_mesh,
            mp_policy=policy,
            reshard_after_forward=zero_stage == 3 and module is not model,
            shard_placement_fn=placement,
        )
        if half is not None:
            module.register_forward_pre_hook(_accumulate_in_fp32)
    _keep_on_host(model)


def set_last_micro_batch(model: nn.Module, last: bool, zero_stage: Literal[1, 2, 3]) -> None:
    """Say whether the coming backward pass is the step's last: ZeRO 1 reduces gradients only then, all sum them over
    replicas only then, and 1 and 2 keep the parameters gathered until then."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last or zero_stage > 1)
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or zero_stage == 3)


def _accumulate_in_fp32(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Gathered parameters in half precision get fp32 gradients; what a linear layer sums is then never rounded. FSDP
    would round every micro-batch's gradient, and widen it in a pass of its own."""
    state = _get_module_fsdp_state(module)
    for group in () if state is None else state._fsdp_param_groups:
        for parameter in group.fsdp_params:
            parameter.unsharded_param.grad_dtype = torch.float32


@dataclass(frozen=True)
class _Held:
    """A tensor among a module's arguments that FSDP does not see."""

    tensor: Tensor


def _keep_on_host(model: nn.Module) -> None:
    """Leave tensors on the CPU there: on an accelerator FSDP moves all arguments of its root module to the device, and
    document boundaries belong to the host."""

    def hide(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_Held(arg) if isinstance(arg, Tensor) and arg.device.type == "cpu" else arg for arg in args)

    def show(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg.tensor if isinstance(arg, _Held) else arg for arg in args)

    model.register_forward_pre_hook(hide, prepend=True)
    model.register_forward_pre_hook(show)


def _shard_dimension(shape: torch.Size, size: int) -> int:
    """The first dimension that `size` ranks share evenly; 0 if there is none, where FSDP pads.

    Stacked weights such as the feed-forward layer's `[2, F, H]` would otherwise leave most ranks without a share.
    """
    return next((dim for dim, length in enumerate(shape) if length % size == 0), 0)
