"""Layer statistics that the Pangu Ultra report plots over depth (figures 9 and 10): activations and norm gains."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pangu.model.local import local

SUB_LAYERS = ("attention", "feed_forward")
NORMS = ("attention_norm", "post_attention_norm", "feed_forward_norm", "post_feed_forward_norm")


Moments = list[float]
"""Of some of the values: how many, their mean, variance and largest absolute value."""

Observations = dict[tuple[str, int], list[Moments]]
"""By sub-layer or norm, and layer."""


class LayerStatistics:
    """Watches the sub-layers of a model while `record` is open, and costs nothing at other times.

    Numbers stay on the device until `result`, so that recording does not wait for it.
    """

    def __init__(
        self, parts: Sequence[nn.Module], gather: Callable[[Observations], list[Observations]] = lambda seen: [seen]
    ) -> None:
        """parts: this process's parts of the model, each with `layers` by number. gather: what all ranks have seen."""
        self._layers: dict[int, nn.Module] = {
            int(index): layer for part in parts for index, layer in part.get_submodule("layers").named_children()
        }
        self._gather = gather
        self._active = False
        self._outputs: list[tuple[str, int, int]] = []  # sub-layer, layer, elements
        self._moments: list[Tensor] = []  # [3] each: mean, variance, largest absolute value

    @contextmanager
    def record(self, active: bool = True) -> Iterator["LayerStatistics"]:
        """Start afresh and take in every forward pass inside the `with` block; nothing unless `active`."""
        self._active, self._outputs, self._moments = active, [], []
        with ExitStack() as hooks:
            for index, layer in self._layers.items() if active else ():
                for name in SUB_LAYERS:
                    hook = partial(self._add, name, index)
                    hooks.callback(layer.get_submodule(name).register_forward_hook(hook).remove)
            yield self

    @torch.no_grad()
    def result(self) -> dict[str, Any] | None:
        """What `record` saw on all ranks, None if nothing was recorded. Lists have one entry per layer, in order:

        layers                                  their numbers
        activations.{sub-layer}.{mean,std,max}  over all elements and micro-batches; max is of absolute values
        gains.{norm}.{mean,std}                 of the norms that the model has
        """
        if not self._active or not self._moments:
            return None
        seen: defaultdict[tuple[str, int], list[Moments]] = defaultdict(list)
        for observations in self._gather(self._observations()):
            for key, moments in observations.items():
                seen[key] += moments
        layers = sorted({index for _, index in seen})
        columns = {
            name: [_merge(seen[name, index]) for index in layers]
            for name in SUB_LAYERS + NORMS
            if (name, layers[0]) in seen
        }
        return {
            "layers": layers,
            "activations": {name: _columns(columns[name], ("mean", "std", "max")) for name in SUB_LAYERS},
            "gains": {
                name: _columns([row[:2] for row in columns[name]], ("mean", "std")) for name in NORMS if name in columns
            },
        }

    @torch.no_grad()
    def _add(self, name: str, index: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # backward computes a forward pass again
        self._outputs.append((name, index, output.numel()))
        self._moments.append(_moments(output))

    def _observations(self) -> Observations:
        places, moments = list(self._outputs), list(self._moments)
        for index, layer in self._layers.items():
            for name in NORMS:
                norm = getattr(layer, name, None)
                gain = None if norm is None else local(norm.weight)
                if gain is not None and gain.numel():
                    places.append((name, index, gain.numel()))
                    moments.append(_moments(gain))
        seen: defaultdict[tuple[str, int], list[Moments]] = defaultdict(list)
        for (name, index, elements), numbers in zip(places, torch.stack(moments).tolist(), strict=True):
            seen[name, index].append([elements, *numbers])
        return dict(seen)


def _moments(values: Tensor) -> Tensor:
    variance, mean = torch.var_mean(values.float(), correction=0)
    return torch.stack((mean, variance, values.abs().amax().float()))


def _merge(parts: list[Moments]) -> list[float]:
    """Mean, deviation and maximum over parts of the values."""
    total = sum(elements for elements, *_ in parts)
    mean = sum(elements * part for elements, part, _, _ in parts) / total
    squares = sum(elements * (variance + (part - mean) ** 2) for elements, part, variance, _ in parts)
    return [mean, math.sqrt(squares / total), max(largest for *_, largest in parts)]


def _columns(rows: list[list[float]], names: tuple[str, ...]) -> dict[str, list[float]]:
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
