"""A training job as the planner sees it: what the memory and time models depend on, and nothing else."""

from dataclasses import dataclass
from typing import Literal

from pangu.config import Config, ModelConfig
from pangu.parallel.layout import Layout

Recompute = Literal["none", "selective", "full"]


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
    """Masks of the residual and attention dropout are kept."""


@dataclass(frozen=True)
class Overlap:
    """What communication hides behind computation."""

    tensor: bool = False
    """Matmuls and their tensor-parallel collectives in pieces (MC2, CoC, async TP)."""
    gradients: bool = True
    """Gradients are reduced while backward goes on."""
    parameters: bool = True
    """Parameters are gathered while forward goes on."""


@dataclass(frozen=True)
class Framework:
    """Conventions of a training framework that change memory and time; see docs/planning.md."""

    name: str = "pangu"


PANGU = Framework()


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
    precision: Literal["bf16", "fp16", "fp8", "fp32"] = "bf16"
    context_exchange: Literal["ring", "all_gather"] = "ring"
    overlap: Overlap = Overlap()
    framework: Framework = PANGU

    @property
    def num_micro_batches(self) -> int:
        """Of one data-parallel rank in one step."""
        return self.batch_size // (self.micro_batch_size * self.layout.dp)

    @property
    def tokens(self) -> int:
        """Of one optimizer step over all ranks."""
        return self.batch_size * self.sequence_length

    def recompute_of(self, pp_rank: int, stage_layers: int) -> tuple[Recompute, int]:
        """Policy of a pipeline rank and how many of a stage's layers it holds for."""
        mode = self.recompute[pp_rank if len(self.recompute) > 1 else 0]
        if not self.recompute_layers:
            return mode, stage_layers
        limit = self.recompute_layers[pp_rank if len(self.recompute_layers) > 1 else 0]
        return mode, min(limit, stage_layers)


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
