"""A training job as the planner sees it: what the memory and time models depend on, and nothing else."""

from dataclasses import dataclass
from typing import Literal

from pangu.config import Config, ModelConfig
from pangu.parallel.layout import Layout

Recompute = Literal["none", "selective", "every second matmul", "every second layer", "full"]
Precision = Literal["bf16", "fp16", "fp8", "fp32"]


@dataclass(frozen=True)
class Architecture:
    """A dense decoder. Wider than `ModelConfig`: published measurements are of other models too."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    gated: bool = True
    """SwiGLU (three matrices) instead of GELU (two)."""
    rms_norm: bool = True
    """RMSNorm instead of LayerNorm."""
    tied: bool = False
    """The head is the embedding table."""
    post_norms: bool = False
    """Sandwich norm: four norms a layer instead of two."""
    attention_bias: bool = False
    feed_forward_bias: bool = False
    local_filter: str = "none"
    learned_positions: int = 0
    """Rows of a learned position table (GPT). 0: rotary."""
    dropout: bool = False
    """After attention, after the sub-layers and inside softmax."""

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class Overlap:
    """What communication hides behind computation."""

    tensor: bool = False
    """Matmuls and their tensor-parallel collectives in pieces (MC2, CoC, async TP)."""
    tensor_backward: bool = True
    """Backward's collectives of tensor parallelism beside the weight gradients (Megatron's asynchronous linear)."""
    gradients: bool = True
    """Gradients are reduced while backward goes on."""
    parameters: bool = True
    """Parameters are gathered while forward goes on."""


@dataclass(frozen=True)
class Framework:
    """Conventions of a training framework that change memory and time; see docs/planning.md."""

    name: str = "pangu"
    fused_attention: bool = True
    """Flash attention: no S x S matrix in memory, nothing computed above the diagonal."""
    fused_elementwise: bool = True
    """Norms, rotary embedding, activation and residual are one operator each, instead of PyTorch's single steps."""
    fused_cross_entropy: bool = True
    """The loss reads its logits a few times only, instead of once per PyTorch operator."""
    fused_gradient_accumulation: bool = True
    """Weight gradients add up inside the matmul, instead of in passes of their own."""
    layer_ms: float = 0.0
    """Every pass through a layer, forward, again or backward, takes so much longer, whatever its size."""
    compiled: bool = False
    """A graph runs: no operator waits for the host."""
    gradient_bytes: int = 4
    """Of a gradient on its way through the reduction."""
    context_gradient_bytes: int = 2
    """Of a gradient of keys and values on its way between context-parallel ranks."""
    asynchronous_linear: bool = True
    """Backward's tensor-parallel collectives run beside the weight gradients."""
    all_reduces_gradients: bool = False
    """Every rank gets all reduced gradients, whatever it keeps of them."""
    broadcasts_parameters: bool = False
    """Every rank sends its share of the parameters in a broadcast of its own."""
    waits_for_sends: bool = False
    """A pipeline rank computes nothing while it sends or receives."""
    slices_sends: bool = True
    """Every tensor-parallel rank sends its share of an activation only."""
    network_flows: int = 0
    """Ports of a node that one collective uses. 0: all."""

    weight_bytes: int = 2
    """Of a parameter in the working copy beside the master copy. 0: the sharded master copy is gathered (FSDP)."""
    accumulated_bytes: int = 4
    """Of a gradient between micro-batches."""
    optimizer_bytes: int = 12
    """Of a parameter in master copy and moments, before sharding."""
    keeps_raw_keys: bool = True
    """Keys stay in memory beside their rotated copies, because values are views of the same tensor."""
    gathered_pieces: int = 1
    """ZeRO 3 gathers a layer in so many pieces, one at a time."""
    statistics_bytes: int = 4
    """Of one token and head that attention keeps for backward."""
    loss_bytes: tuple[int, int] = (6, 6)
    """Of one logit at the end of the head's forward pass, and in the middle of its backward pass. (0, 0): in chunks."""
    frees_gradients: bool = False
    """There are none between the optimizer's step and the next backward pass."""
    embedding_gradient_bytes: int = 2
    """Of one value of the table while the embedding's gradient is computed: it is dense."""
    keeps_outputs: bool = False
    """Of a pipeline stage until its backward pass, beside what the next rank has got."""
    bucket_bytes: float = 0.0
    """Buffers in which gradients and parameters are communicated."""
    fragmentation: float = 0.04
    """What the caching allocator holds beyond its peak in use, as a share of it. 4.3 % on the mean of 12 published
    pairs (SimuMax on B200)."""
    pools_per_stream: bool = False
    """Memory is told as reserved, and every stream has a pool of its own: the largest parameters that FSDP gathers lie
    in that of the gathers and, copied, in that of computation."""
    weight_gradient_copies: bool = False
    """Beside the accumulated gradients autograd gets tensors of the same shapes: one of every kind is kept."""


PANGU = Framework(
    slices_sends=False,
    context_gradient_bytes=4,
    weight_bytes=0,
    optimizer_bytes=8,
    loss_bytes=(0, 0),
    frees_gradients=True,
    embedding_gradient_bytes=4,
    keeps_outputs=True,
)


@dataclass(frozen=True)
class Job:
    """One optimizer step of a model under a layout."""

    model: Architecture
    layout: Layout
    sequence_length: int
    micro_batch_size: int
    """Sequences of one forward pass of one data-parallel rank."""
    batch_size: int
    """Sequences of an optimizer step over all ranks."""
    schedule: str = "1f1b"
    sequence_parallel: bool = True
    zero_stage: int = 1
    """0 (nothing sharded) to 3, over layout.dp_shard ranks."""
    recompute: tuple[Recompute, ...] = ("none",)
    """One for every pipeline rank, or one each."""
    recompute_layers: tuple[int, ...] = ()
    """Recompute only the first so many layers of every stage: one number for all pipeline ranks, or one each."""
    recompute_layers_of_rank: bool = False
    """`recompute_layers` counts the layers of all stages of a pipeline rank together (MindSpeed)."""
    recomputes_activation: bool = False
    """The activation function's output is computed again in layers that are not recomputed otherwise."""
    precision: Precision = "bf16"
    context_exchange: Literal["ring", "all_gather"] = "ring"
    overlap: Overlap = Overlap()
    framework: Framework = PANGU

    @property
    def num_micro_batches(self) -> int:
        """Of one data-parallel rank in one step."""
        return self.batch_size // (self.micro_batch_size * self.layout.dp)

    @property
    def reduces_every_micro_batch(self) -> bool:
        """FSDP with sharded gradients; under a pipeline gradients are reduced once, at the end."""
        return self.framework.weight_bytes == 0 and self.zero_stage >= 2 and self.layout.pp == 1

    @property
    def gathers_every_layer(self) -> bool:
        """ZeRO 3: parameters are freed between a layer's forward and its backward pass."""
        return self.zero_stage == 3

    @property
    def tokens(self) -> int:
        """Of one optimizer step over all ranks."""
        return self.batch_size * self.sequence_length

    @property
    def local_tokens(self) -> int:
        """Of one micro-batch on one context-parallel rank."""
        return self.micro_batch_size * self.sequence_length // self.layout.cp

    @property
    def element_bytes(self) -> int:
        """Of an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def sequence_shards(self) -> int:
        """Tensor-parallel ranks over which the residual stream is sharded."""
        return self.layout.tp if self.sequence_parallel else 1

    @property
    def local_kv_heads(self) -> float:
        """Key-value heads of one tensor-parallel rank; ranks share a head when there are more of them than heads."""
        return max(self.model.num_key_value_heads / self.layout.tp, 1)

    def recompute_of(self, stage: int) -> tuple[Recompute, int]:
        """Policy of a stage and for how many of its layers it holds."""
        rank, layers = self.layout.rank_of_stage(stage), self.layout.stage_layers[stage]
        mode = self.recompute[rank if len(self.recompute) > 1 else 0]
        if not self.recompute_layers:
            return mode, layers
        limit = self.recompute_layers[rank if len(self.recompute_layers) > 1 else 0]
        if self.recompute_layers_of_rank:
            limit -= sum(
                self.layout.stage_layers[earlier] for earlier in self.layout.stages_of(rank) if earlier < stage
            )
        return mode, max(0, min(limit, layers))


def architecture_of(model: ModelConfig) -> Architecture:
    return Architecture(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        tied=model.tie_embeddings,
        post_norms=model.has_post_norm,
        attention_bias=model.attention_bias,
        feed_forward_bias=model.feed_forward_bias,
        local_filter=model.local_filter,
    )


def job_of(config: Config, layout: Layout, phase: int = 0) -> Job:
    """The job that `pangu train` would run in a phase of `config` under `layout`."""
    parallel, at = config.parallel, config.phases[phase]
    mode = parallel.recompute.mode
    return Job(
        model=architecture_of(config.model),
        layout=layout,
        sequence_length=at.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        batch_size=at.batch_size_ramp[-1].batch_size if at.batch_size_ramp else at.batch_size,
        schedule=parallel.pipeline_schedule,
        sequence_parallel=parallel.sequence_parallel,
        zero_stage=parallel.zero_stage,
        recompute=(mode,) if isinstance(mode, str) else mode,
        recompute_layers=parallel.recompute.layers,
        precision=config.train.dtype,
        context_exchange=parallel.context_exchange,
        overlap=Overlap(tensor=parallel.overlap in ("auto", "chunked", "fused")),
    )
