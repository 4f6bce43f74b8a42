"""Memory of every pipeline rank in bytes, in closed form."""

from dataclasses import dataclass

from pangu.plan.activations import embedding_bytes, head_bytes, layer_bytes, layer_workspace
from pangu.plan.hardware import GIB, Cluster
from pangu.plan.job import Job
from pangu.plan.parameters import layer_parameters, rank_parameters, table_parameters
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
    moments: float
    """The part of `optimizer` that the first step of a run allocates."""

    @property
    def static(self) -> float:
        """Between two steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def allocated(self) -> float:
        """What the framework's allocator reports as its peak."""
        return self.static + self.activations + self.logits + self.workspace

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
    sizes = _stage_bytes(job)
    return tuple(_rank_memory(job, rank, sizes) for rank in range(job.layout.pp))


def fits(job: Job, cluster: Cluster) -> bool:
    """Whether every rank stays within the device's memory."""
    return max(rank.total for rank in memory(job, cluster)) <= cluster.chip.memory_bytes


def _rank_memory(job: Job, rank: int, sizes: list[float]) -> RankMemory:
    framework = job.framework
    weights, gradients, optimizer, gathered = _state(job, rank)
    activations = _in_flight(job, rank, sizes)
    stages = job.layout.stages_of(rank)
    modes = [job.recompute_of(stage) for stage in stages]
    workspace = gathered + max(layer_workspace(job, mode if count else "none") for mode, count in modes)
    logits = 0.0
    if job.layout.num_stages - 1 in stages:
        logits, beside = head_bytes(job)
        if beside + gathered >= workspace:
            logits, workspace = logits + beside, gathered
    if 0 in stages:  # the layers' activations of a micro-batch are gone when the embedding's gradient is computed
        table = framework.embedding_gradient_bytes * table_parameters(job)
        workspace = max(workspace, table + gathered - sizes[0] - logits)
    if framework.weight_gradient_copies:
        workspace += 2 * layer_parameters(job)
    allocated = weights + gradients + optimizer + activations + logits + workspace
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        workspace=workspace,
        communication=COMMUNICATOR_BYTES * _communicators(job) + framework.bucket_bytes,
        overhead=CONTEXT_BYTES + framework.fragmentation * allocated,
        moments=optimizer * 8 / framework.optimizer_bytes,
    )


def _state(job: Job, rank: int) -> tuple[float, float, float, float]:
    """Weights, accumulated gradients, optimizer state; and gathered weights and gradients of the layer at work."""
    framework, layout = job.framework, job.layout
    n = rank_parameters(job, rank)
    shards = layout.dp_shard * layout.cp
    if framework.weight_bytes:
        sharded = shards if job.zero_stage >= 1 else 1
        return (
            framework.weight_bytes * n / (shards if job.zero_stage == 3 else 1),
            framework.accumulated_bytes * n / (shards if job.zero_stage >= 2 else 1),
            framework.optimizer_bytes * n / sharded,
            0.0,
        )
    working, element = 4 * n / shards, 4 if job.precision == "fp32" else 2
    layer = layer_parameters(job)
    outside = n - sum(layout.stage_layers[stage] for stage in layout.stages_of(rank)) * layer
    if shards * layout.dp_replicate == 1:
        return 4 * n, 4 * n, 8 * n, (0.0 if element == 4 else element * max(layer / 2, table_parameters(job)))
    keeps_all = job.zero_stage < 3
    gathered = element * (n if keeps_all else outside)
    accumulated = 4 * n / shards
    transient = (4 + element) * layer  # its gradients; and, whatever is kept, one gather's or reduction's buffer
    if keeps_all and not job.reduces_every_micro_batch and job.num_micro_batches > 1:
        accumulated += 4 * n
        transient = 4 * layer
    elif not keeps_all:
        transient = (transient + 2 * element * layer) / framework.gathered_pieces
    return working + gathered, accumulated, 8 * n / shards, transient


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


def _in_flight(job: Job, rank: int, sizes: list[float]) -> float:
    """Most that a rank keeps of all micro-batches at one moment."""
    if job.layout.pp == 1:
        return sizes[0]
    return pipeline_order(job, min(job.num_micro_batches, 4 * job.layout.pp)).peak(rank, sizes)


def _communicators(job: Job) -> int:
    """Groups a device is a member of: the world, and one along every dimension that is there."""
    layout = job.layout
    along = (layout.tp, layout.cp, layout.pp, layout.dp * layout.cp, layout.dp_replicate)
    return 1 + sum(size > 1 for size in along)
