"""A model built for a layout: the parts of it that this rank holds, and what a training step does with all ranks."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pangu.config import Config
from pangu.data.batch import Batch
from pangu.model import Transformer, generate, init_weights
from pangu.parallel.context import apply_context_parallel
from pangu.parallel.context_layout import partition, shard_batch
from pangu.parallel.data import apply_fsdp, set_last_micro_batch
from pangu.parallel.gradients import local_gradients, squared_norm, sum_over
from pangu.parallel.layout import Layout
from pangu.parallel.mesh import Mesh, make_mesh
from pangu.parallel.pipeline import Pipeline, TiedEmbedding, split
from pangu.parallel.recompute import apply_recompute
from pangu.parallel.shards import init_shards
from pangu.parallel.tensor import apply_tensor_parallel, partial_gradients

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(config: Config, layout: Layout, target: torch.device) -> "ParallelModel":
    """This rank's part of the model of `config`, on `target`, initialized from train.seed.

    On several processes every rank calls it, with the default process group in place.
    """
    mesh = make_mesh(layout, target.type) if layout.world_size > 1 else None
    parts = assemble(config, layout, mesh)
    for part in parts:
        part.to_empty(device=target)
        if mesh is None:
            init_weights(part, config.train.seed)
        else:
            init_shards(part, config.train.seed)
    return ParallelModel(config, layout, mesh, parts, target)


def assemble(config: Config, layout: Layout, mesh: Mesh | None) -> list[Transformer]:
    """This rank's parts of the model, one per pipeline stage it holds, distributed but without memory.

    Everything is applied in one order: stages, recomputation, context parallelism, tensor parallelism, FSDP.
    """
    with torch.device("meta"):
        whole = Transformer(config.model)
    whole.compute_dtype = DTYPES[config.train.dtype]
    pp_rank = 0 if mesh is None else mesh.coordinates["pp"]
    parts = [whole] if layout.pp == 1 else [split(whole, layout, stage) for stage in layout.stages_of(pp_rank)]
    apply_recompute(parts, config.parallel.recompute, pp_rank)
    if mesh is not None:
        for part in parts:
            _distribute(part, config, mesh)
    return parts


def _distribute(part: Transformer, config: Config, mesh: Mesh) -> None:
    if mesh.cp_group is not None:
        apply_context_parallel(part, mesh.cp_group, config.parallel.context_exchange)
    if mesh.layout.tp > 1:
        apply_tensor_parallel(part, mesh.state["tp"], config.parallel)
    if mesh.gradient_ranks > 1:
        apply_fsdp(part, mesh, config.parallel.zero_stage)


class ParallelModel:
    """The model of a run on this rank. On a single process there is one part, and nothing communicates."""

    def __init__(
        self, config: Config, layout: Layout, mesh: Mesh | None, parts: list[Transformer], target: torch.device
    ) -> None:
        """parts: as `assemble` makes them, with memory on `target`."""
        self.config = config
        self.layout = layout
        self.target = target
        self.mesh = mesh
        self.parts = parts
        self.context_imbalance = 1.0
        """Attention's work on the busiest context-parallel rank over the mean, in the last step's worst micro-batch."""
        self.pipeline = Pipeline(self.parts, self.mesh, config) if self.mesh and layout.pp > 1 else None
        self.tied = TiedEmbedding(self.parts, self.mesh) if self.mesh and self.pipeline else None
        self.parameters: dict[str, nn.Parameter] = {}
        for part in self.parts:
            self.parameters |= dict(part.named_parameters())
        self._partial = [
            name for name in self.parameters if layout.tp > 1 and partial_gradients(name, config.model, config.parallel)
        ]

    @property
    def gradient_ranks(self) -> int:
        return 1 if self.mesh is None else self.mesh.gradient_ranks

    @property
    def rank(self) -> int:
        return 0 if self.mesh is None else self.mesh.rank

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies; a training phase sets it."""
        return self.parts[0].rope_base

    @rope_base.setter
    def rope_base(self, base: float) -> None:
        for part in self.parts:
            part.rope_base = base

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Sums over all ranks of numbers known to the host."""
        return self._over_ranks(values, dist.ReduceOp.SUM)

    def max_over_ranks(self, *values: float) -> list[float]:
        """The largest on any rank of numbers known to the host."""
        return self._over_ranks(values, dist.ReduceOp.MAX)

    def gather(self, value: T) -> list[T]:
        """A picklable value of every rank, in their order."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.layout.world_size
        dist.all_gather_object(values, value)
        return values

    def any_rank(self, value: bool) -> bool:
        """Whether it is true on any rank."""
        return bool(self.max_over_ranks(value)[0])

    def _over_ranks(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.mesh is None:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, operation)
        return numbers.tolist()

    def count_labels(self, batches: Sequence[Batch]) -> int:
        """Labels of all data-parallel ranks' batches."""
        (total,) = self.sum_over_ranks(sum(batch.num_labels() for batch in batches))
        return round(total) * self.layout.dp // self.layout.world_size

    def forward_backward(self, batches: Sequence[Batch], num_labels: int) -> Tensor:
        """Gradients of the loss summed over `batches` of all ranks and divided by `num_labels`.

        Returns this rank's part of that loss, fp32 `[]`: parts of all ranks add up to it.
        """
        self.context_imbalance = max(self._imbalance(batch) for batch in batches)
        # FSDP takes the mean over the ranks that hold shards of the same parameters, where the loss is a sum. Each
        # token's loss is scaled, since the gradient of the head's weight would be scaled in a pass of its own.
        factor = self.gradient_ranks / max(num_labels, 1)
        batches = [self._mine(batch) for batch in batches]
        if self.pipeline is not None:
            loss = self.pipeline.forward_backward(batches, factor)
        else:
            loss = torch.zeros((), device=self.target)
            for index, batch in enumerate(batches):
                set_last_micro_batch(self.parts[0], index == len(batches) - 1, self.config.parallel.zero_stage)
                micro_batch_loss = self._loss(batch.scaled(factor))
                micro_batch_loss.backward()
                loss += micro_batch_loss.detach()
        self._finish_gradients()
        return loss / self.gradient_ranks * self._counts_loss

    def loss_and_gradient_norm(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of `loss` over ranks, and the 2-norm of all gradients together: each once, whatever holds copies."""
        extra = {} if self.tied is None else self.tied.copies
        numbers = torch.stack((loss.float(), squared_norm(self.parameters, extra)))
        if self.mesh is not None:
            dist.all_reduce(numbers)
        total, squared = numbers.unbind()
        return total, squared.sqrt()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Loss summed over all labels of all data-parallel ranks' batches."""
        batches = [self._mine(batch) for batch in batches]
        if self.pipeline is not None:
            total = sum(self.pipeline.evaluate(batches))
        else:
            total = sum(self._loss(batch).item() for batch in batches)
        (whole,) = self.sum_over_ranks(total * self._counts_loss)
        return whole

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **sampling: Any) -> list[list[int]]:
        """`pangu.model.generate` by all ranks, and for each of them; not with sequence or context parallelism."""
        if self.pipeline is not None:
            return self.pipeline.generate(prompts, max_new_tokens, **sampling)
        return generate(self.parts[0], prompts, max_new_tokens, **sampling)

    def _loss(self, batch: Batch) -> Tensor:
        part, weights = self.parts[0], batch.loss_weights
        loss_sum, _ = part.loss(batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens, weights)
        return loss_sum

    def _imbalance(self, batch: Batch) -> float:
        cp = self.layout.cp
        return partition(batch.cu_seqlens, cp).imbalance() if cp > 1 else 1.0

    def _mine(self, batch: Batch) -> Batch:
        if self.mesh is not None and self.mesh.cp_group is not None:
            batch = shard_batch(batch, self.mesh.coordinates["cp"], self.layout.cp)
        return batch.to(self.target, non_blocking=True)

    @property
    def _counts_loss(self) -> int:
        """1 on one of the ranks that know the same loss, 0 on the others."""
        if self.mesh is None:
            return 1
        at = self.mesh.coordinates
        last_stage_rank = self.layout.rank_of_stage(self.layout.num_stages - 1)
        return int(at["tp"] == 0 and at["pp"] == last_stage_rank)

    def _finish_gradients(self) -> None:
        """What is left to sum once FSDP has reduced: parts that tensor-parallel ranks hold of norm gains and the like,
        all in one all-reduce, and the two uses of a tied embedding."""
        if self._partial and self.mesh is not None:
            gradients = local_gradients({name: self.parameters[name] for name in self._partial})
            sum_over(self.mesh.tp_group, list(gradients.values()))
        if self.tied is not None:
            self.tied.sum_gradients()
