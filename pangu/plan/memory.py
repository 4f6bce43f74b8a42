"""Memory of every pipeline rank in bytes, in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pangu.plan.activations import deferred_bytes, embedding_bytes, head_bytes, layer_bytes, layer_workspace
from pangu.plan.hardware import GIB, Cluster
from pangu.plan.job import Job
from pangu.plan.parameters import layer_parameters, rank_parameters, stage_parameters, table_parameters
from pangu.plan.simulate import Moments, one_forward_one_backward
from pangu.plan.time import pipeline_order

COMMUNICATOR_BYTES = 200 * 2**20
"""Of one communicator: HCCL_BUFFSIZE's default; NCCL's channels take about as much."""
CONTEXT_BYTES = 0.9 * GIB
"""Of the driver's context and the kernels, which no allocator reports."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one device of a pipeline rank at its fullest moment, by kind."""

    weights: float
    """Master copies that are weights too (FSDP), gathered or working copies."""
    gradients: float
    """Accumulated over micro-batches."""
    optimizer: float
    """Moments, and master copies beside working weights."""
    activations: float
    """Of all micro-batches in flight."""
    logits: float
    """The head's logits and loss, whole or in chunks, and what stands beside them."""
    workspace: float
    """Temporary tensors of the layer at work: gathered weights, recomputed activations, gradients."""
    communication: float
    """Buffers of the communicators, outside the allocator."""
    overhead: float
    """The driver's context, and what the allocator keeps beyond what is in use."""
    static: float
    """Of weights, gradients and optimizer state, between two steps."""
    moments: float
    """The part of `optimizer` that the first step of a run allocates."""

    @property
    def allocated(self) -> float:
        """What the framework's allocator reports as its peak."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.activations + self.logits + self.workspace

    @property
    def first_step(self) -> float:
        """Peak of a run's first step, whose passes come before the moments: what Megatron's report shows."""
        return max(self.static, self.allocated - self.moments)

    @property
    def reserved(self) -> float:
        """What the allocator holds."""
        return self.allocated + self.overhead - CONTEXT_BYTES

    @property
    def total(self) -> float:
        """What the device must have."""
        return self.allocated + self.communication + self.overhead


def memory(job: Job, cluster: Cluster) -> tuple[RankMemory, ...]:
    """Peak memory of one device of every pipeline rank."""
    sizes, pp = _stage_bytes(job), job.layout.pp
    shortened = min(job.num_micro_batches, 4 * pp)
    order = pipeline_order(job, shortened) if pp > 1 else one_forward_one_backward(1, shortened)
    return tuple(_rank_memory(job, rank, sizes, order.moments[rank]) for rank in range(pp))


def fits(job: Job, cluster: Cluster) -> bool:
    """Whether every rank stays within the device's memory."""
    return max(rank.total for rank in memory(job, cluster)) <= cluster.chip.memory_bytes


def _rank_memory(job: Job, rank: int, sizes: list[float], moments: Moments) -> RankMemory:
    framework = job.framework
    state = _state(job, rank)
    activations, gradients, logits, workspace = _fullest(job, rank, sizes, state, moments)
    allocated = state.weights + gradients + state.optimizer + activations + logits + workspace
    return RankMemory(
        weights=state.weights,
        gradients=gradients,
        optimizer=state.optimizer,
        activations=activations,
        logits=logits,
        workspace=workspace,
        communication=COMMUNICATOR_BYTES * _communicators(job) + framework.bucket_bytes,
        overhead=CONTEXT_BYTES + framework.fragmentation * allocated + state.pools,
        static=state.between_steps,
        moments=state.optimizer * 8 / framework.optimizer_bytes,
    )


@dataclass(frozen=True)
class _State:
    """Bytes of one device that do not depend on activations."""

    weights: float
    gradients: float
    optimizer: float
    between_steps: float
    reduced: float = 0.0
    """Of `gradients`, what the last micro-batch leaves."""
    in_layer: float = 0.0
    """Gathered weights, gradients and buffers of the layer whose backward pass runs."""
    in_head: float = 0.0
    """What is there beside the head at work."""
    pools: float = 0.0
    """Kept by the allocator for other streams than that of computation."""


def _state(job: Job, rank: int) -> _State:
    framework, layout = job.framework, job.layout
    n, shards = rank_parameters(job, rank), layout.dp_shard * layout.cp
    if framework.weight_bytes:
        weights = framework.weight_bytes * n / (shards if job.zero_stage == 3 else 1)
        gradients = framework.accumulated_bytes * n / (shards if job.zero_stage >= 2 else 1)
        optimizer = framework.optimizer_bytes * n / (shards if job.zero_stage else 1)
        return _State(weights, gradients, optimizer, weights + gradients + optimizer)
    kept = 12 * n / shards + (0.0 if framework.frees_gradients else 4 * n / shards)
    if shards * layout.dp_replicate == 1:
        cast = 0.0 if job.precision == "fp32" else job.element_bytes * table_parameters(job)
        return _State(4 * n, 4 * n, 8 * n, kept, 4 * n, in_head=cast)
    return _sharded_state(job, rank, kept)


def _sharded_state(job: Job, rank: int, between_steps: float) -> _State:
    """FSDP: an fp32 shard of everything, weights gathered in half precision, gradients summed in fp32."""
    layout, element = job.layout, job.element_bytes
    n, shards, layer = rank_parameters(job, rank), layout.dp_shard * layout.cp, layer_parameters(job)
    outside = n - sum(layout.stage_layers[stage] for stage in layout.stages_of(rank)) * layer
    keeps_weights = job.zero_stage < 3
    pieces = job.framework.gathered_pieces
    in_layer = 8 * layer / pieces  # gradients, and a copy to be reduced
    in_head, gradients = 0.0, 4 * n / shards
    if job.num_micro_batches > 1 and not job.reduces_every_micro_batch:
        gradients = 4 * n  # whole, and reduced in the last backward pass, when no other micro-batch is in flight
        in_layer = 4 * layer / pieces if layout.pp == 1 else 0.0
    elif job.reduces_every_micro_batch and job.num_micro_batches > 1:
        in_head = 4 * outside  # the micro-batch before has left its last reduction's copy
    if not keeps_weights:
        in_layer += 2 * element * layer / pieces  # one layer gathered, the next on its way
        in_head += element * layer / pieces
    weights = 4 * n / shards + element * (n if keeps_weights else outside)
    pools = element * outside if job.framework.pools_per_stream else 0.0
    return _State(weights, gradients, 8 * n / shards, between_steps, 4 * n / shards, in_layer, in_head, pools)


def _stage_bytes(job: Job) -> list[float]:
    """Activations of one micro-batch on every stage."""
    sizes = []
    per_mode = {mode: layer_bytes(job, mode) for mode in {"none", *job.recompute}}
    for stage, layers in enumerate(job.layout.stage_layers):
        mode, count = job.recompute_of(stage)
        size = count * per_mode[mode] + (layers - count) * per_mode["none"]
        if stage < job.layout.num_stages - 1 and job.framework.keeps_outputs:
            size += embedding_bytes(job)  # what was sent is kept to start backward from
        sizes.append(size)
    return sizes


def _fullest(job: Job, rank: int, sizes: list[float], state: _State, moments: Moments) -> tuple[float, ...]:
    """Activations, gradients, logits and workspace at the moment when a rank holds most of them together.

    Gradients come as activations go: with few micro-batches there is no moment with all of both.
    """
    held, at_head = moments
    stages = job.layout.stages_of(rank)
    waiting = [job.layout.stage_layers[stage] * deferred_bytes(job) for stage in stages]
    if not job.framework.frees_gradients:
        waiting = [sizes[stage] for stage in stages]
    activations = held[:, :, 0] @ [sizes[stage] for stage in stages] + held[:, :, 1] @ waiting
    gradients = _gradients(job, rank, state, held)
    kept, head, layer = _beside(job, stages, sizes, state)
    workspace = layer * (activations > 0)
    logits = kept * (held[:, -1, 0] - at_head)  # the head's backward pass comes before the layers'
    head_takes_more = at_head & (kept + head > workspace)
    logits = np.where(head_takes_more, logits + kept + head, logits)
    workspace = np.where(head_takes_more, 0.0, workspace)
    fullest = np.argmax(activations + gradients + logits + workspace)
    return tuple(float(each[fullest]) for each in (activations, gradients, logits, workspace))


def _gradients(job: Job, rank: int, state: _State, held: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """At every moment."""
    if not job.framework.frees_gradients:
        return np.full(len(held), state.gradients)
    stages = job.layout.stages_of(rank)
    shares = np.array([stage_parameters(job, stage) for stage in stages]) / rank_parameters(job, rank)
    gradients = held[:, :, 2] @ (shares * state.gradients) + held[:, :, 3] @ (shares * state.reduced)
    if job.layout.num_stages - 1 in stages:  # the head's gradient is not left for later
        before_others = (held[:, -1, 1] > 0) & ~held[:, -1, 2:].any(1)
        gradients += before_others * 4 * table_parameters(job)
    return np.asarray(gradients)


def _beside(job: Job, stages: Sequence[int], sizes: list[float], state: _State) -> tuple[float, float, float]:
    """What the head keeps of a micro-batch; what it takes while it works; what a layer at work takes."""
    kept, head = head_bytes(job) if job.layout.num_stages - 1 in stages else (0.0, 0.0)
    modes = [job.recompute_of(stage) for stage in stages]
    layer = state.in_layer + max(layer_workspace(job, mode if count else "none") for mode, count in modes)
    if 0 in stages:  # the layers' activations of a micro-batch are gone when the embedding's gradient is computed
        table = job.framework.embedding_gradient_bytes * table_parameters(job)
        layer = max(layer, table + state.in_layer - sizes[0] - kept)
    copies = 2 * layer_parameters(job) if job.framework.weight_gradient_copies else 0.0
    return kept, head + state.in_head + copies, layer + copies


def _communicators(job: Job) -> int:
    """Groups a device is a member of: the world, and one along every dimension that is there."""
    layout = job.layout
    along = (layout.tp, layout.cp, layout.pp, layout.dp * layout.cp, layout.dp_replicate)
    return 1 + sum(size > 1 for size in along)
