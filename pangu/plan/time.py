"""Seconds of one optimizer step, from the shapes of its operators and the rates of the hardware."""

from dataclasses import dataclass

from pangu.plan.hardware import Cluster
from pangu.plan.job import Job
from pangu.plan.layer import Cost, Passes, block, embedding, head, recomputed
from pangu.plan.operators import Operators
from pangu.plan.parameters import layer_parameters, rank_parameters, stage_parameters, table_parameters
from pangu.plan.simulate import Durations, Order, Timeline, one_forward_one_backward, schedule_order, simulate
from pangu.plan.zero_bubble import LIMITS, zero_bubble_order


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch in one pipeline stage, communication that is not hidden included."""

    forward: float
    backward_input: float
    """Gradients of activations, and what is computed again for them."""
    backward_weight: float
    """Gradients of weights."""

    @property
    def total(self) -> float:
        return self.forward + self.backward_input + self.backward_weight


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    step: float
    stages: tuple[StageTime, ...]
    p2p: float
    """Of one activation from a stage to the next."""
    pipeline: float
    """First forward to last backward, bubble included."""
    bubble: float
    """Idle share of `pipeline` on the average rank: the paper's (p-1)/(m+p-1) for 1f1b."""
    optimizer: float
    exposed: dict[str, float]
    """Communication that delays the step, by dimension (tp, cp, pp, dp), on the slowest rank."""
    hidden: dict[str, float]
    """Communication behind computation, by dimension."""

    @property
    def bubble_over_ideal(self) -> float:
        """Megatron's convention: idle time over busy time."""
        return self.bubble / (1 - self.bubble)


def step_time(job: Job, cluster: Cluster) -> StepTime:
    """Time of one optimizer step of `job` on `cluster`."""
    operators = Operators(job, cluster)
    passes = stage_passes(operators)
    send = send_seconds(operators)
    stages = tuple(_stage_time(operators, each, send) for each in passes)
    gathers, reductions, hidden = data_parallel(operators, stages)
    seconds, pipeline, bubble = _pipeline(job, stages, send, (gathers, reductions))
    optimizer = optimizer_seconds(operators)
    tied = tied_seconds(operators)
    step = seconds + tied + optimizer + cluster.efficiency.step_ms * 1e-3
    exposed, concealed = _communication(job, passes)
    exposed["dp"] = exposed.get("dp", 0.0) + seconds - pipeline + tied
    concealed["dp"] = concealed.get("dp", 0.0) + hidden
    if job.layout.pp > 1:
        sends = 2 * job.num_micro_batches * send * job.layout.num_stages / job.layout.pp
        (exposed if job.framework.waits_for_sends else concealed)["pp"] = sends
    return StepTime(step, stages, send, pipeline, bubble, optimizer, exposed, concealed)


def _communication(job: Job, passes: list[Passes]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per step by dimension, exposed and hidden, on the rank that communicates most."""
    best: tuple[dict[str, float], dict[str, float]] = {}, {}
    for rank in range(job.layout.pp):
        total = Cost()
        for stage in job.layout.stages_of(rank):
            for each in (passes[stage].forward, passes[stage].backward_input, passes[stage].backward_weight):
                total = total + each * job.num_micro_batches
        if sum(total.exposed.values()) >= sum(best[0].values()):
            best = total.exposed, total.hidden
    return best


def stage_passes(operators: Operators) -> list[Passes]:
    """Cost of every stage for one micro-batch."""
    job = operators.job
    layout = job.layout
    plain = block(operators)
    modes = {mode: recomputed(operators, plain, mode) for mode in {"none", *job.recompute}}
    result = []
    for stage, layers in enumerate(layout.stage_layers):
        mode, count = job.recompute_of(stage)
        total = _times(modes[mode], count, modes["none"], layers - count)
        if job.gathers_every_layer or job.reduces_every_micro_batch:
            _transfer_parameters(operators, total, stage)
        if stage == 0:
            total = _plus(total, embedding(operators))
        if stage == layout.num_stages - 1:
            total = _plus(total, head(operators))
        result.append(total)
    return result


def _times(a: Passes, n: int, b: Passes, m: int) -> Passes:
    return Passes(
        a.forward * n + b.forward * m,
        a.backward_input * n + b.backward_input * m,
        a.backward_weight * n + b.backward_weight * m,
    )


def _plus(a: Passes, b: Passes) -> Passes:
    return Passes(a.forward + b.forward, a.backward_input + b.backward_input, a.backward_weight + b.backward_weight)


def _transfer_parameters(operators: Operators, passes: Passes, stage: int) -> None:
    """Parameters gathered before a layer's forward and again before its backward, gradients scattered after it.

    What lies outside of the layers is not gathered again, and under a pipeline it stays (`data_parallel`). There FSDP
    also leaves a layer that a backward pass gathered to the next forward pass, so that only one backward pass of all
    micro-batches adds a gather.
    """
    job = operators.job
    size, members, flows = _fsdp_group(operators)
    if size == 1:
        return
    layers = job.layout.stage_layers[stage] * layer_parameters(job)
    whole = stage_parameters(job, stage) if job.layout.pp == 1 else layers
    gather = again = scatter = 0.0
    if job.gathers_every_layer:
        gather = operators.gather(size, members, 2 * whole, flows)
        again = operators.gather(size, members, 2 * layers, flows)
        if job.layout.pp > 1 and job.framework.weight_bytes == 0:
            again /= job.num_micro_batches
    if job.reduces_every_micro_batch:
        scatter = operators.gather(size, members, job.framework.gradient_bytes * whole, flows)
    backward = passes.backward_input.compute + passes.backward_weight.compute
    both = again + scatter or 1.0
    for cost, transfer, compute in (
        (passes.forward, gather, passes.forward.compute),
        (passes.backward_input, again, backward * again / both),
        (passes.backward_weight, scatter, backward * scatter / both),
    ):
        cost.transfer("dp", transfer, operators.cluster.efficiency.overlap * min(transfer, compute))


def _fsdp_group(operators: Operators) -> tuple[int, int, int]:
    layout = operators.job.layout
    size = layout.dp_shard * layout.cp
    return size, _members_per_node(operators, size, layout.tp), operators.job.framework.network_flows


def _members_per_node(operators: Operators, size: int, stride: int) -> int:
    """How many of a group of `size` ranks, so many apart, share a node."""
    return max(1, min(size, operators.cluster.node.devices // stride))


def _stage_time(operators: Operators, passes: Passes, send: float) -> StageTime:
    host = operators.cluster.efficiency.operator_us * 1e-6 * (0 if operators.job.framework.compiled else 1)
    wait = send if operators.job.framework.waits_for_sends and operators.job.layout.pp > 1 else 0.0
    return StageTime(
        passes.forward.seconds(host) + wait,
        passes.backward_input.seconds(host) + wait,
        passes.backward_weight.seconds(host),
    )


def send_seconds(operators: Operators) -> float:
    """One micro-batch's activations from a stage to the next."""
    job = operators.job
    layout = job.layout
    if layout.pp == 1:
        return 0.0
    size = float(job.element_bytes * job.local_tokens * job.model.hidden_size)
    if job.sequence_parallel or job.framework.slices_sends:
        size /= layout.tp
    stride = layout.tp * layout.cp * layout.dp
    return operators.send(size, stride >= operators.cluster.node.devices)


def _pipeline(
    job: Job, stages: tuple[StageTime, ...], send: float, transfers: tuple[list[float], list[float]]
) -> tuple[float, float, float]:
    """Seconds of the passes with their data-parallel collectives, of the passes alone, and their idle share."""
    layout, m = job.layout, job.num_micro_batches
    if layout.pp == 1:
        seconds = m * sum(stage.total for stage in stages)
        return seconds + sum(transfers[0]) + sum(transfers[1]), seconds, 0.0
    rounds = 4 * layout.pp
    few = _simulated(job, stages, send, m if m <= 2 * rounds else rounds + m % layout.pp, transfers)
    short = few.order.micro_batches
    start = _stagger(job, few)
    if short == m:
        seconds = few.pipeline_seconds - start
        return few.seconds - start, seconds, 1 - few.ideal_seconds / seconds
    more = _simulated(job, stages, send, short + layout.pp, transfers)
    rest = (more.pipeline_seconds - few.pipeline_seconds) / layout.pp * (m - short)
    seconds = few.pipeline_seconds - start + rest
    return few.seconds - start + rest, seconds, 1 - few.ideal_seconds / short * m / seconds


def _stagger(job: Job, timeline: Timeline) -> float:
    """What a step saves where ranks begin the next one as soon as they are done: the whole of the first step's ramp.

    Zero-bubble schedules validate the gradient norm after the optimizer's step, so that no rank waits for all.
    """
    if job.schedule not in LIMITS:
        return 0.0
    spans: dict[int, tuple[float, float]] = {}
    for step, start, end in zip(timeline.order.steps, timeline.start, timeline.end, strict=True):
        first, _ = spans.get(step.rank, (start, end))
        spans[step.rank] = min(first, start), end
    return timeline.pipeline_seconds - max(end - start for start, end in spans.values())


def _simulated(
    job: Job, stages: tuple[StageTime, ...], send: float, m: int, transfers: tuple[list[float], list[float]]
) -> Timeline:
    order = pipeline_order(job, m, stages)
    sends = [0.0 if job.framework.waits_for_sends else send] * job.layout.num_stages
    durations = Durations(
        [stage.forward for stage in stages],
        [stage.backward_input for stage in stages],
        [stage.backward_weight for stage in stages],
        sends,
        *transfers,
    )
    return simulate(order, durations)


def pipeline_order(job: Job, micro_batches: int, stages: tuple[StageTime, ...] = ()) -> Order:
    """Order of passes of `micro_batches` micro-batches under the job's schedule.

    Zero-bubble schedules of one stage per rank are made for the stages' times; without them all passes are alike.
    """
    layout = job.layout
    if job.schedule in LIMITS:
        whole = max((stage.total for stage in stages), default=1.0)
        parts = [(at.forward, at.backward_input, at.backward_weight) for at in stages] or [(1.0, 1.0, 1.0)] * layout.pp
        durations = tuple((round(f / whole, 4), round(b / whole, 4), round(w / whole, 4)) for f, b, w in parts)
        return zero_bubble_order(job.schedule, micro_batches, durations)
    if job.schedule == "1f1b" and job.framework.name != "pangu":
        return one_forward_one_backward(layout.pp, micro_batches)
    return schedule_order(job.schedule, layout.pp, layout.num_stages // layout.pp, micro_batches)


def tied_seconds(operators: Operators) -> float:
    """Sum of the tied table's gradients of the first and the last stage."""
    job = operators.job
    if not job.model.tied or job.layout.pp == 1:
        return 0.0
    stride = job.layout.tp * job.layout.cp * job.layout.dp * (job.layout.pp - 1)
    across = stride >= operators.cluster.node.devices
    return operators.send(job.framework.gradient_bytes * table_parameters(job), across)


def data_parallel(operators: Operators, stages: tuple[StageTime, ...]) -> tuple[list[float], list[float], float]:
    """Exposed seconds of gathering every stage's parameters and of reducing its gradients, and the hidden ones.

    What overlaps does so with the stage's first forward or last backward pass; the simulation of the pipeline lets the
    rest run beside the passes of the rank's other stages.
    """
    job = operators.job
    layout, framework = job.layout, job.framework
    if layout.dp * layout.cp == 1:
        nothing = [0.0] * layout.num_stages
        return nothing, nothing, 0.0
    size, members, flows = _fsdp_group(operators)
    hide = operators.cluster.efficiency.overlap
    gathers, reductions, hidden = [], [], 0.0
    for stage, time in enumerate(stages):
        parameters = stage_parameters(job, stage)
        gather = operators.gather(size, members, 2 * parameters, flows) if job.zero_stage else 0.0
        if job.gathers_every_layer:
            outside = parameters - layout.stage_layers[stage] * layer_parameters(job)
            gather = operators.gather(size, members, 2 * outside, flows) if layout.pp > 1 else 0.0
        both = _reduction(operators, framework.gradient_bytes * parameters)
        if framework.broadcasts_parameters and job.zero_stage:
            gather += layout.dp_shard * operators.latency(layout.dp_shard, members)
        backward = time.backward_input + time.backward_weight
        hidden_gather = hide * min(gather, time.forward) if job.overlap.parameters else 0.0
        hidden_reduction = hide * min(both, backward) if job.overlap.gradients else 0.0
        gathers.append(gather - hidden_gather)
        reductions.append(both - hidden_reduction)
        hidden += hidden_gather + hidden_reduction
    return gathers, reductions, hidden


def _reduction(operators: Operators, gradient_bytes: float) -> float:
    """Seconds of the reduction that ends a step: gradients scattered over ranks that shard, summed over copies."""
    job = operators.job
    layout, flows = job.layout, job.framework.network_flows
    if job.zero_stage == 0 or job.framework.all_reduces_gradients:
        size = layout.dp * layout.cp
        return 2 * operators.gather(size, _members_per_node(operators, size, layout.tp), gradient_bytes, flows)
    size, members, _ = _fsdp_group(operators)
    scatter = 0.0 if job.reduces_every_micro_batch else operators.gather(size, members, gradient_bytes, flows)
    copies = layout.dp_replicate
    near = _members_per_node(operators, copies, layout.tp * size)
    return scatter + 2 * operators.gather(copies, near, gradient_bytes / size, flows)


def optimizer_seconds(operators: Operators) -> float:
    """AdamW over this rank's share: gradients read, master weights and moments read and written; the norm; zeroing."""
    job = operators.job
    parameters = max(rank_parameters(job, rank) for rank in range(job.layout.pp))
    share = parameters / (job.layout.dp_shard * job.layout.cp if job.zero_stage else 1)
    local = share if job.framework.weight_bytes == 0 or job.zero_stage >= 2 else parameters
    return operators.moving(30 * share + 8 * local)
