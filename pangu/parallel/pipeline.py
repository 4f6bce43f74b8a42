"""Pipeline parallelism: the stages of a layout under the schedules of torch.distributed.pipelining.

Stages send one another the residual stream and its gradient, nothing else: every rank reads the micro-batches itself
and so knows positions, document boundaries and labels. The loss is part of the last stage's forward pass. With tensor
and context parallelism each rank sends its own share of the stream to the same share of the next stage.

What the library does otherwise, and why not here:

- It takes keyword arguments for all micro-batches as one tensor to cut up; boundaries differ in number, so a stage
  looks its micro-batch up by its index.
- It keeps a receive buffer for every micro-batch of a step, of which there may be hundreds; here a buffer exists from
  the receive to the end of its use.
- It splits a backward pass in two by running parts of the autograd graph twice. Operators that compute both gradients
  at once would do all their work twice, collectives and full recomputation included. Linear layers leave the gradient
  of their weight for later instead (`pangu_kernels.deferred`).
- Between micro-batches it frees and gathers again FSDP's parameters of all but three stages per rank; here only for
  ZeRO 3.
- DualPipeV's pairs of a forward and a backward pass, meant to overlap, it runs one after the other, but sends the
  first's result only after the second. Here they are passes like any other.
- It cannot evaluate under V-shaped schedules, nor generate; forward passes alone have a loop of their own.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pangu_kernels.deferred import Deferred
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining._utils import _make_tensor_from_meta
from torch.distributed.pipelining.schedules import RESHARD, UNSHARD

from pangu.config import Config
from pangu.data.batch import Batch
from pangu.model import Transformer, generate
from pangu.model.cache import Cache
from pangu.model.generate import logits_of_last_tokens
from pangu.model.linear import Linear
from pangu.model.local import local
from pangu.parallel.layout import Layout
from pangu.parallel.mesh import Mesh


class _DualPipeV(ScheduleDualPipeV):
    def _prepare_schedule_with_comms(self, actions: dict[int, list[Any]], format: Any = "compute_only") -> None:
        alone = {
            rank: [each for action in row if action is not None for each in action.sub_actions or (action,)]
            for rank, row in actions.items()
        }
        super()._prepare_schedule_with_comms(alone, format)


_SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zero_bubble_v": ScheduleZBVZeroBubble,
    "dualpipe_v": _DualPipeV,
}
_SPLIT_BACKWARD = ("interleaved_zero_bubble", "zero_bubble_v", "dualpipe_v")


def split(model: Transformer, layout: Layout, stage: int) -> Transformer:
    """The part of `model` (on the meta device) that is a stage: its layers, under their numbers in the whole model.

    The first stage reads tokens; the last has the final norm and the head, which with tied embeddings is a copy of the
    embedding (see `TiedEmbedding`).
    """
    is_first, is_last = stage == 0, stage == layout.num_stages - 1
    part = copy.deepcopy(model)
    part.layers = nn.ModuleDict({str(index): part.layers[str(index)] for index in layout.layers_of_stage(stage)})
    part.reads_tokens = is_first
    if not is_last:
        part.norm = part.head = None
    if not is_first and not (is_last and model.config.tie_embeddings):
        part.embedding = None
    return part


class TiedEmbedding:
    """The embedding table whose first copy looks tokens up and whose second, on the last stage, is the head.

    Both copies get the sum of both gradients. On different ranks each is a parameter like any other, and the same
    updates keep them equal; `copies` says so to whoever sums over ranks. Under a V-shaped schedule both are on one
    rank, where the last stage's is the parameter and `Pipeline` refreshes the other from it.
    """

    def __init__(self, parts: Sequence[Transformer], mesh: Mesh) -> None:
        """parts: this rank's, distributed and initialized."""
        layout, at = mesh.layout, mesh.coordinates["pp"]
        self._group = mesh.pp_group
        self._weights: list[nn.Parameter] = []
        if parts[0].config.tie_embeddings:
            self._weights = [part.embedding.weight for part in parts if part.embedding is not None]
        holders = {layout.rank_of_stage(0), layout.rank_of_stage(layout.num_stages - 1)}
        self._peer = next(iter(holders - {at})) if self._weights and len(holders) == 2 else None
        self.copies: dict[str, int] = {} if self._peer is None else {"embedding.weight": 2}
        """Of parameters on ranks of other pipeline stages: how many there are."""

    def sum_gradients(self) -> None:
        """Called by every rank once its gradients are complete."""
        if not self._weights:
            return
        gradients = [local(weight.grad) for weight in self._weights if weight.grad is not None]
        if self._peer is None:
            of_embedding, of_head = gradients
            of_head += of_embedding
            self._weights[0].grad = None
        elif gradients[0].numel():
            gradients[0] += _exchange(gradients[0], self._peer, self._group)


class Pipeline:
    """This rank's stages of the model, run together with those of the other ranks of its pipeline.

    All of them call every method in the same order and with the same batches. Batches hold what this rank's share of
    the data is (with context parallelism, of every document), on the device of its parameters.
    """

    def __init__(self, parts: Sequence[Transformer], mesh: Mesh, config: Config) -> None:
        """parts: of the stages `mesh.layout.stages_of` this rank, in that order."""
        layout, rank = mesh.layout, mesh.coordinates["pp"]
        self.layout = layout
        self.group = mesh.pp_group
        self.parts = dict(zip(layout.stages_of(rank), parts, strict=True))
        self.device = next(parts[0].parameters()).device
        self.sequence_shards = layout.tp if config.parallel.sequence_parallel else 1
        self._schedule_name = config.parallel.pipeline_schedule
        self._keeps_gathered = config.parallel.zero_stage < 3
        self._last_rank = layout.rank_of_stage(layout.num_stages - 1)
        self._plans: dict[tuple[int, int], tuple[Any, list[_Stage]]] = {}
        tables = [part.embedding.weight for part in parts if part.embedding is not None]
        self._tied_copies = tables if len(tables) == 2 else []
        self._deferred: dict[int, Deferred] = {}
        if self._schedule_name in _SPLIT_BACKWARD:
            self._deferred = {stage: _defer_weight_gradients(part) for stage, part in self.parts.items()}

    def forward_backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """Accumulate the gradients of `scale` times the loss summed over `batches`, one micro-batch each.

        Batches have the same number of tokens; from call to call that number and how many there are may change. Returns
        the scaled loss, fp32 `[]`, on every rank of the pipeline. FSDP reduces gradients once, at the end.
        """
        self._refresh_tied_copy()
        schedule, stages = self._plan(len(batches), self._rows(batches[0].tokens))
        for stage in stages:
            stage.batches, stage.scale = batches, scale
        losses: list[Tensor] = []
        schedule.step(target=torch.empty(len(batches)), losses=losses, return_outputs=False)
        total = torch.zeros((), device=self.device)
        for loss in losses:
            total += loss.detach()
        return self._from_last_stage(total)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> list[float]:
        """The loss sum of each batch, on every rank of the pipeline."""
        if not batches:
            return []
        self._refresh_tied_copy()

        def run(index: int, part: Transformer, x: Tensor) -> Tensor:
            return _run(part, x, batches[index])

        losses = self._forward([batch.tokens for batch in batches], run)
        total = torch.stack(losses) if losses else torch.empty(len(batches), device=self.device)
        result: list[float] = self._from_last_stage(total).tolist()
        return result

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """`pangu.model.generate` with the whole model, on every rank of the pipeline."""
        self._refresh_tied_copy()
        any_part = next(iter(self.parts.values()))
        return generate(any_part, prompts, max_new_tokens, next_logits=self.next_logits, **options)

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor, cache: Cache) -> Tensor:
        """The whole model's `pangu.model.generate.NextLogits`; every rank caches its own layers."""

        def run(index: int, part: Transformer, x: Tensor) -> Tensor:
            hidden: Tensor = part(x, position_ids, cu_seqlens, cache)
            return hidden if part.norm is None else logits_of_last_tokens(part, hidden, cu_seqlens)

        results = self._forward([tokens], run)
        any_part = next(iter(self.parts.values()))
        shape = len(cu_seqlens) - 1, any_part.config.vocab_size
        return self._from_last_stage(
            results[0] if results else torch.empty(shape, dtype=any_part.compute_dtype, device=self.device)
        )

    def _forward(self, tokens: Sequence[Tensor], run: Callable[[int, Transformer, Tensor], Tensor]) -> list[Tensor]:
        """Every item of `tokens` through all stages: what `run(index, part, input)` returns on the last one, there.

        A rank takes as many items as there are ranks through one stage before it goes on to its next: by then the
        first of them has been around.
        """
        results: list[Tensor] = []
        sends: list[tuple[dist.Work | None, Tensor]] = []
        here: dict[int, Tensor] = {}
        for start in range(0, len(tokens), self.layout.pp):
            for stage, part in self.parts.items():
                for index in range(start, min(start + self.layout.pp, len(tokens))):
                    x = tokens[index] if stage == 0 else here.pop(index, None)
                    if x is None:
                        x = self._empty_stream(self._rows(tokens[index]))
                        dist.recv(x, group=self.group, group_src=self.layout.rank_of_stage(stage - 1))
                    y = run(index, part, x)
                    if stage == self.layout.num_stages - 1:
                        results.append(y)
                    elif stage + 1 in self.parts:
                        here[index] = y
                    else:
                        peer = self.layout.rank_of_stage(stage + 1)
                        sends.append((dist.isend(y, group=self.group, group_dst=peer), y))
        for work, _ in sends:
            if work is not None:
                work.wait()
        return results

    def _plan(self, count: int, rows: int) -> tuple[Any, list["_Stage"]]:
        """The schedule for so many micro-batches of so many rows of the residual stream, and the stages it runs."""
        if (count, rows) not in self._plans:
            stream = self._empty_stream(rows, "meta").requires_grad_()
            stages = [
                _Stage(part, stage, self.layout.num_stages, stream, self.device, self.group, self._deferred.get(stage))
                for stage, part in self.parts.items()
            ]
            schedule = _SCHEDULES[self._schedule_name](
                stages[0] if self._schedule_name == "1f1b" else stages, count, loss_fn=_given_loss, scale_grads=False
            )
            if self._keeps_gathered and self._schedule_name != "1f1b":
                _gather_once(schedule)
            self._plans[count, rows] = schedule, stages
        return self._plans[count, rows]

    def _rows(self, tokens: Tensor) -> int:
        return len(tokens) // self.sequence_shards

    def _empty_stream(self, rows: int, device: torch.device | str | None = None) -> Tensor:
        part = next(iter(self.parts.values()))
        size = rows, part.config.hidden_size
        return torch.empty(size, dtype=part.compute_dtype, device=device or self.device)

    def _from_last_stage(self, result: Tensor) -> Tensor:
        """The last stage's `result`, which on other ranks is overwritten."""
        dist.broadcast(result, group=self.group, group_src=self._last_rank)
        return result

    @torch.no_grad()
    def _refresh_tied_copy(self) -> None:
        """See `TiedEmbedding`."""
        if self._tied_copies:
            of_embedding, of_head = self._tied_copies
            local(of_embedding).copy_(local(of_head))


class _Stage(PipelineStage):
    """A stage as the library's schedules run it."""

    def __init__(
        self,
        part: Transformer,
        index: int,
        num_stages: int,
        stream: Tensor,
        device: torch.device,
        group: dist.ProcessGroup,
        deferred: Deferred | None,
    ) -> None:
        """stream: what travels between stages, on the meta device."""
        is_first, is_last = index == 0, index == num_stages - 1
        self.batches: Sequence[Batch] = ()
        self.scale = 1.0
        self._part = part
        super().__init__(
            part,
            index,
            num_stages,
            device,
            input_args=torch.empty(0, dtype=torch.int64, device="meta") if is_first else stream,
            output_args=torch.empty((), device="meta", requires_grad=True) if is_last else stream,
            group=group,
            dw_builder=None if deferred is None else deferred.take,
        )

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        self._batch = self.batches[fwd_chunk_id]
        return super().forward_one_chunk(fwd_chunk_id, (self._batch.tokens,), None, save_forward_output)

    def forward_maybe_with_nosync(self, x: Tensor) -> Tensor:
        return _run(self._part, x, self._batch.scaled(self.scale) if self.is_last else self._batch)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_activations(fwd_chunk_id)
        _release(self.args_recv_info[fwd_chunk_id])
        return received

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_grads(bwd_chunk_id)
        _release(self.grad_recv_info[bwd_chunk_id])
        return received

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        self.device, device = torch.device("meta"), self.device
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        self.device = device

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        self.device, device = torch.device("meta"), self.device
        super()._setup_backward_recv_info(num_microbatches)
        self.device = device

    def _allocate(self, infos: Sequence[Any]) -> None:
        for info in infos:
            if not info.is_root_arg:
                info.buffer = _make_tensor_from_meta(info.tensor_meta, self.device)


def _run(part: Transformer, x: Tensor, batch: Batch) -> Tensor:
    """The part's output for its input: the residual stream, or on the last stage the loss sum."""
    if part.norm is None:
        hidden: Tensor = part(x, batch.position_ids, batch.cu_seqlens)
        return hidden
    loss_sum: Tensor = part(x, batch.position_ids, batch.cu_seqlens, None, batch.labels, batch.loss_weights)[0]
    return loss_sum


def _given_loss(output: Tensor, target: Tensor) -> Tensor:
    return output


def _release(infos: Sequence[Any]) -> None:
    for info in infos:
        info.buffer = None


def _defer_weight_gradients(part: Transformer) -> Deferred:
    deferred = Deferred()
    for module in part.layers.modules():
        if isinstance(module, Linear):
            module.deferred = deferred
    return deferred


def _gather_once(schedule: Any) -> None:
    """Keep only the first UNSHARD and the last RESHARD of every stage."""
    actions = schedule.pipeline_order_with_comms[schedule.rank]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, action in enumerate(actions):
        if action.computation_type == UNSHARD:
            first.setdefault(action.stage_index, position)
        elif action.computation_type == RESHARD:
            last[action.stage_index] = position
    kept = {*first.values(), *last.values()}
    schedule.pipeline_order_with_comms[schedule.rank] = [
        action
        for position, action in enumerate(actions)
        if position in kept or action.computation_type not in (UNSHARD, RESHARD)
    ]


def _exchange(mine: Tensor, peer: int, group: dist.ProcessGroup) -> Tensor:
    """The peer's tensor, given this rank's, which is like it."""
    theirs = torch.empty_like(mine)
    operations = [
        dist.P2POp(dist.isend, mine.contiguous(), group=group, group_peer=peer),
        dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return theirs
