"""Seconds of one transformer block, of the embedding and of the head, for one micro-batch on one device."""

from dataclasses import dataclass, field, replace

from pangu.plan.job import Recompute
from pangu.plan.operators import ATTENTION_ROWS, Operators, alignment


@dataclass
class Cost:
    """Seconds of one pass. `exposed` and `hidden` are by dimension (tp, cp)."""

    compute: float = 0.0
    exposed: dict[str, float] = field(default_factory=dict)
    hidden: dict[str, float] = field(default_factory=dict)
    operators: float = 0.0
    """Operators the host starts."""

    def transfer(self, dimension: str, seconds: float, hidden: float = 0.0) -> None:
        """A transfer of which `hidden` seconds run beside computation."""
        self.exposed[dimension] = self.exposed.get(dimension, 0.0) + seconds - hidden
        self.hidden[dimension] = self.hidden.get(dimension, 0.0) + hidden

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.compute + other.compute,
            _sum(self.exposed, other.exposed),
            _sum(self.hidden, other.hidden),
            self.operators + other.operators,
        )

    def __mul__(self, factor: float) -> "Cost":
        return Cost(
            self.compute * factor,
            {name: value * factor for name, value in self.exposed.items()},
            {name: value * factor for name, value in self.hidden.items()},
            self.operators * factor,
        )

    def seconds(self, operator_seconds: float) -> float:
        """Of the device, or of the host where it is slower."""
        return self.compute + sum(self.exposed.values()) + self.operators * operator_seconds


def _sum(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in {*a, *b}}


@dataclass
class Passes:
    """Forward, backward for activations, backward for weights."""

    forward: Cost
    backward_input: Cost
    backward_weight: Cost


def block(operators: Operators) -> Passes:
    """One transformer block without recomputation."""
    passes = Passes(Cost(), Cost(), Cost())
    _linears(operators, passes)
    _attention(operators, passes)
    _elementwise(operators, passes)
    for cost in (passes.forward, passes.backward_input):
        cost.compute += operators.job.framework.layer_ms * 1e-3
    return passes


def recomputed(operators: Operators, passes: Passes, mode: Recompute) -> Passes:
    """`passes` with what backward computes again."""
    if mode == "none":
        return passes
    if mode == "full":
        return replace(passes, backward_input=passes.backward_input + passes.forward)
    if mode == "every second layer":
        return replace(passes, backward_input=passes.backward_input + passes.forward * 0.5)
    scratch = Passes(Cost(), Cost(), Cost())
    if mode == "every second matmul":
        _linears(operators, scratch)
        scratch.forward *= 0.5
        _elementwise(operators, scratch)
    elif operators.job.framework.fused_attention:
        _elementwise(operators, scratch)
    else:
        _attention(operators, scratch)
    return replace(passes, backward_input=passes.backward_input + scratch.forward)


def _linears(operators: Operators, passes: Passes) -> None:
    job = operators.job
    model, t, tokens = job.model, job.layout.tp, job.local_tokens
    h, query, key_value = model.hidden_size, model.query_size / t, job.local_kv_heads * model.head_dim
    wide = model.intermediate_size / t
    inner = (2 if model.gated else 1) * wide
    collective = operators.gather(t, operators.members_per_node("tp", t), 2 * tokens * h)
    for columns, rows in ((query + 2 * key_value, query), (inner, wide)):
        _linear_pair(operators, passes, tokens, h, columns, rows, collective)
    if model.local_filter.startswith("two_convolutions"):
        # Two convolutions of two taps, h -> h/2 -> h: matmuls of depth 2h and h.
        half = h / 2 / t
        for n, k in ((half, 2 * h), (h, 2 * half)):
            passes.forward.compute += operators.matmul(tokens, n, k)
            passes.backward_input.compute += operators.matmul(tokens, k, n)
            passes.backward_weight.compute += operators.matmul(n, k, tokens, weight_gradient=True)
        passes.forward.transfer("tp", 3 * collective)  # and values are projected from what has not been filtered
        passes.backward_input.transfer("tp", 3 * collective)
        passes.backward_weight.transfer("tp", collective)
    passes.forward.operators += 8
    passes.backward_input.operators += 8
    passes.backward_weight.operators += 8
    if job.precision == "fp8":
        _casts(operators, passes, tokens, (h, query, h, wide), h * (2 * query + 2 * key_value + wide + inner))
    if not job.framework.fused_gradient_accumulation:
        weights = h * (2 * query + 2 * key_value + wide + inner)
        passes.backward_weight.compute += operators.moving(12 * weights)


def _casts(operators: Operators, passes: Passes, tokens: int, inputs: tuple[float, ...], weights: float) -> None:
    """fp8: the largest value of every input, weight and gradient found, and all of them cast."""
    values = tokens * sum(inputs)
    passes.forward.compute += operators.moving(5 * (values + weights))
    passes.backward_input.compute += operators.moving(5 * values)
    passes.backward_weight.compute += operators.moving(2 * values)


def _linear_pair(
    operators: Operators, passes: Passes, tokens: int, h: int, columns: float, rows: float, collective: float
) -> None:
    """A column-parallel matmul h -> `columns` and a row-parallel one `rows` -> h, with their collectives.

    With sequence parallelism `collective` is an all-gather before the first and a reduce-scatter after the second,
    without it an all-reduce (both) after the second; backward mirrors them.
    """
    job = operators.job
    first, second = operators.matmul(tokens, columns, h), operators.matmul(tokens, h, rows)
    d_first, d_second = operators.matmul(tokens, h, columns), operators.matmul(tokens, rows, h)
    w_first = operators.matmul(columns, h, tokens, weight_gradient=True)
    w_second = operators.matmul(h, rows, tokens, weight_gradient=True)
    forward, backward, weight = passes.forward, passes.backward_input, passes.backward_weight
    forward.compute += first + second
    backward.compute += d_first + d_second
    weight.compute += w_first + w_second
    if job.layout.tp == 1:
        return
    hide = operators.cluster.efficiency.overlap

    def beside(compute: float, when: bool) -> float:
        return hide * min(collective, compute) if when else 0.0

    overlap = job.overlap
    asynchronous = overlap.tensor or overlap.tensor_backward
    forward.operators += 4
    backward.operators += 4
    if job.sequence_parallel:
        forward.transfer("tp", collective, beside(first, overlap.tensor))
        forward.transfer("tp", collective, beside(second, overlap.tensor))
        backward.transfer("tp", collective, beside(d_second, overlap.tensor))
        backward.transfer("tp", collective, beside(w_first, asynchronous))  # gradients of the gathered input
        weight.transfer("tp", collective, beside(d_first, asynchronous))  # the input gathered again
    else:
        forward.transfer("tp", 2 * collective, beside(second, overlap.tensor))
        backward.transfer("tp", 2 * collective, beside(w_first, asynchronous))


def _attention(operators: Operators, passes: Passes) -> None:
    job = operators.job
    model, c = job.model, job.layout.cp
    heads, tokens = model.num_attention_heads / job.layout.tp, job.local_tokens
    full = 4 * tokens * job.sequence_length * heads * model.head_dim  # both products, nothing masked
    if not job.framework.fused_attention:
        return _unfused_attention(operators, passes, full)
    flops, blocks = full / 2, heads * tokens / ATTENTION_ROWS
    forward, backward = operators.attention(flops, blocks), operators.attention(flops, blocks, backward=True)
    passes.forward.compute += forward
    passes.backward_input.compute += backward
    passes.forward.operators += 2
    passes.backward_input.operators += 2
    if c > 1:
        _context_exchange(operators, passes, forward, backward)


def _context_exchange(operators: Operators, passes: Passes, forward: float, backward: float) -> None:
    job = operators.job
    c, hide = job.layout.cp, operators.cluster.efficiency.overlap
    key_values = 4 * job.local_tokens * job.local_kv_heads * job.model.head_dim  # bf16 keys and values
    members = operators.members_per_node("cp", c)
    again = 1 + job.framework.context_gradient_bytes / 2  # keys and values once more, and their gradients
    if job.context_exchange == "all_gather":
        collective = operators.gather(c, members, c * key_values)
        passes.forward.transfer("cp", collective)
        passes.backward_input.transfer("cp", again * collective)
        passes.forward.operators += 4
        passes.backward_input.operators += 6
        return
    step = operators.send(key_values, members < c)
    passes.forward.transfer("cp", (c - 1) * step, (c - 1) * hide * min(step, forward / c))
    passes.backward_input.transfer("cp", again * (c - 1) * step, (c - 1) * hide * min(again * step, backward / c))
    passes.forward.operators += 12 * c
    passes.backward_input.operators += 16 * c


def _unfused_attention(operators: Operators, passes: Passes, full: float) -> None:
    """Scores in memory: scaled, masked and normalized by one operator, dropped out by another."""
    job = operators.job
    s, heads = job.sequence_length, job.model.num_attention_heads / job.layout.tp
    scores = job.micro_batch_size * heads * s * s / job.layout.cp
    drop = 1 if job.model.dropout else 0
    rate = operators.cluster.efficiency.matmul * alignment(job.model.head_dim)
    matmuls = full / (operators.attention_peak * rate)
    passes.forward.compute += matmuls + operators.moving(scores * (8 + 5 * drop))
    passes.backward_input.compute += 2 * matmuls + operators.moving(scores * (14 + 5 * drop))
    passes.forward.operators += 6
    passes.backward_input.operators += 8


def _elementwise(operators: Operators, passes: Passes) -> None:
    """Bytes that norms, rotary embedding, activation and residual move per token."""
    job = operators.job
    model, t, fused = job.model, job.layout.tp, job.framework.fused_elementwise
    h, wide = model.hidden_size / job.sequence_shards, model.intermediate_size / t
    turned = 0 if model.learned_positions else model.query_size / t + job.local_kv_heads * model.head_dim
    norms = 4 if model.post_norms else 2
    eager_norm = model.rms_norm and not fused
    residual = 6 + (1 if fused else 5) * model.dropout
    inner = (2 if model.gated else 1) * wide
    split = model.query_size / t + 2 * job.local_kv_heads * model.head_dim
    biases = model.attention_bias * (split + h) + model.feed_forward_bias * (inner + h)
    forward = (
        norms * h * (36 if eager_norm else 4)
        + turned * (4 if fused else 20)
        + wide * ((6 if fused else 10) if model.gated else 4)
        + 2 * h * residual
    )
    backward = (
        norms * h * (60 if eager_norm else 10)
        + turned * (4 if fused else 24)
        + wide * ((10 if fused else 16) if model.gated else 6)
        + 2 * h * (6 + 3 * model.dropout)
        + 2 * biases
    )
    passes.forward.compute += operators.moving(forward * job.local_tokens)
    passes.backward_input.compute += operators.moving(backward * job.local_tokens)
    passes.forward.operators += 10 if fused else 40
    passes.backward_input.operators += 12 if fused else 60


def head(operators: Operators) -> Passes:
    """Final norm, output head and loss."""
    job = operators.job
    model, t, tokens = job.model, job.layout.tp, job.local_tokens
    h, vocab = model.hidden_size, model.vocab_size / t
    passes = Passes(Cost(operators=8), Cost(operators=8), Cost(operators=4))
    passes.forward.compute += operators.matmul(tokens, vocab, h)
    passes.backward_input.compute += operators.matmul(tokens, h, vocab)
    passes.backward_weight.compute += operators.matmul(vocab, h, tokens, weight_gradient=True)
    logits, fused = tokens * vocab, job.framework.fused_cross_entropy
    passes.forward.compute += operators.moving(logits * (6 if fused else 38))
    passes.backward_input.compute += operators.moving(logits * (4 if fused else 20))
    if t > 1:
        collective = operators.gather(t, operators.members_per_node("tp", t), 2 * tokens * h)
        passes.forward.transfer("tp", collective if job.sequence_parallel else 0.0)
        passes.backward_input.transfer("tp", collective if job.sequence_parallel else 2 * collective)
    return passes


def embedding(operators: Operators) -> Passes:
    """Look-up, and the scattered addition of its gradient."""
    job = operators.job
    t, size = job.layout.tp, job.local_tokens * job.model.hidden_size
    passes = Passes(Cost(operators=4), Cost(operators=4), Cost())
    passes.forward.compute += operators.moving(4 * size)
    passes.backward_input.compute += operators.moving(8 * size)
    if t > 1:
        collective = operators.gather(t, operators.members_per_node("tp", t), 2 * size)
        passes.forward.transfer("tp", collective if job.sequence_parallel else 2 * collective)
        passes.backward_input.transfer("tp", collective if job.sequence_parallel else 0.0)
    return passes
