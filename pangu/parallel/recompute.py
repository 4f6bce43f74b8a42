"""Activation recomputation: what backward computes again instead of keeping it from forward to backward.

full        of a layer only its input is kept (Chen et al. 2016); its forward pass runs again, collectives included.
selective   the inputs of matmuls that a norm or the activation function has computed are not kept, but computed again
            from what these keep for their own backward. Outputs of matmuls, attention and collectives stay, so that
            nothing is communicated again (after Korthikanti et al. 2022). Queries and keys stay too, as they enter
            attention: what they would be computed from is as large.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pangu.config import RecomputeConfig
from pangu.model import Transformer

Forward = Callable[..., Tensor]


def apply_recompute(parts: Sequence[Transformer], recompute: RecomputeConfig, pp_rank: int) -> None:
    """Have the layers of a pipeline rank's `parts` recompute as the config says for that rank.

    Results are those without recomputation, to the bit where the same kernel gives the same bits twice.
    """
    modes = (recompute.mode,) if isinstance(recompute.mode, str) else recompute.mode
    mode = modes[pp_rank if len(modes) > 1 else 0]
    if mode == "none":
        return
    wrap = _full if mode == "full" else _selective
    first = recompute.layers[pp_rank if len(recompute.layers) > 1 else 0] if recompute.layers else None
    for part in parts:
        for block in list(part.layers.values())[:first]:
            block.forward = partial(wrap, block.forward)


def _full(forward: Forward, *args: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args)
    # The model draws no random numbers; saving the generators' states would cost a copy from the device per layer.
    output: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
    return output


def _selective(forward: Forward, *args: Any) -> Tensor:
    cheap: dict[tuple[Node, int], _Recomputed] = {}

    def pack(tensor: Tensor) -> Tensor | _Recomputed:
        node = tensor.grad_fn
        if node is None:
            return tensor
        compute = getattr(node, "recompute", {}).get(tensor.output_nr)
        if compute is None:
            return tensor.detach()  # an operator that saves its own output would keep itself alive through it
        key = node, tensor.output_nr
        if key not in cheap:
            cheap[key] = _Recomputed(partial(compute, node))
        cheap[key].uses += 1
        return cheap[key]

    with saved_tensors_hooks(pack, _unpack):
        output = forward(*args)
    cheap.clear()  # the hooks hold it, and it the operators that hold the hooks
    return output


def _unpack(saved: "Tensor | _Recomputed") -> Tensor:
    return saved.again() if isinstance(saved, _Recomputed) else saved


class _Recomputed:
    """An output shared by the operators that save it; exists from the first to the last of their backward passes."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute = compute
        self.uses = 0
        self.value: Tensor | None = None

    def again(self) -> Tensor:
        if self.value is None:
            with torch.no_grad():
                self.value = self.compute()
        value = self.value
        self.uses -= 1
        if not self.uses:
            self.value = None
        return value
