"""One tree of frozen dataclasses: read from TOML, overridden from the command line, validated before anything is built.

`load("debug")` or `load("my.toml", ["--train.steps", "20"])` returns a `Config`. Every field is documented where it is
declared; `pangu config show FILE` prints the resolved tree with these texts.
"""

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from pangu.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

NAMED_CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    vocab_size: int = Field(gt=0)
    """Rows of the embedding table and of the output head."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    num_layers: int = Field(gt=0)
    """Transformer blocks."""
    num_attention_heads: int = Field(gt=0)
    """Query heads."""
    num_key_value_heads: int = Field(default=0, ge=0)
    """Key and value heads (GQA). 0: as many as query heads."""
    head_dim: int = Field(default=0, ge=0)
    """Width of a head. 0: hidden_size / num_attention_heads."""
    intermediate_size: int = Field(gt=0)
    """Width of the SwiGLU feed-forward layer."""

    norm_placement: Literal["pre", "sandwich", "depth_scaled_sandwich"] = "depth_scaled_sandwich"
    """pre: a norm before each sub-layer. sandwich: one before and one after (post-norm gains start at 1).
    depth_scaled_sandwich: the same, post-norm gains start at c / sqrt(num_layers) (Pangu Ultra, equation 1)."""
    attention_post_norm_gain: float = Field(default=0.283, gt=0)
    """c_attn of the depth-scaled sandwich norm."""
    feed_forward_post_norm_gain: float = Field(default=0.432, gt=0)
    """c_mlp of the depth-scaled sandwich norm."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square inside every RMSNorm."""

    initialization: Literal["tiny", "small", "megatron"] = "tiny"
    """tiny: every linear weight N(0, 1/(2 d L)) (Pangu Ultra's TinyInit). small: N(0, 2/(5d)), outputs of sub-layers
    N(0, 2/(5dL)) (the report's baseline). megatron: N(0, 0.02^2), outputs of sub-layers N(0, 0.02^2/(2L))."""
    embedding_std: float = Field(default=0.5, gt=0)
    """Standard deviation of the initial embedding (Pangu Ultra: 0.5)."""

    tie_embeddings: bool = False
    """The output head is the embedding table."""
    attention_bias: bool = False
    """Biases on the query, key, value and output projections (openPangu: true)."""
    feed_forward_bias: bool = False
    """Biases on the feed-forward projections."""

    rope_base: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies; a training phase may replace it."""
    max_position_embeddings: int = Field(default=4096, gt=0)
    """Longest sequence the model is meant for. Nothing in the model depends on it; exports carry it."""

    local_filter: Literal[
        "none",
        "two_convolutions_norm",
        "two_convolutions",
        "convolution_1",
        "convolution_2",
        "convolution_3",
        "convolution_7",
        "exponential_moving_average",
    ] = "none"
    """What queries and keys see besides their own token (Yuan 2.0, Table 1). two_convolutions_norm is Yuan's
    localized filtering-based attention (LFA); the others are the rows of its ablation."""

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def has_post_norm(self) -> bool:
        return self.norm_placement != "pre"

    def __post_init__(self) -> None:
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}; change one of them or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}; every key head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        if self.local_filter != "none":
            if self.num_key_value_heads != self.num_attention_heads:
                raise ValueError(
                    f"local_filter {self.local_filter!r} needs as many key heads as query heads, got "
                    f"num_key_value_heads {self.num_key_value_heads} and num_attention_heads {self.num_attention_heads}"
                )
            if self.local_filter.startswith("two_convolutions") and self.hidden_size % 2:
                raise ValueError(f"local_filter needs an even hidden_size, got {self.hidden_size}")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DomainConfig:
    paths: tuple[str, ...] = Field(min_length=1)
    """Tokenized datasets (`PATH.bin` and `PATH.idx`), read one after the other."""
    validation_paths: tuple[str, ...] = ()
    """Held-out datasets of the same domain; their loss is reported under the domain's name."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FillInTheMiddleConfig:
    rate: float = Field(default=0.0, ge=0, le=1)
    """Share of documents rearranged (Yuan 2.0: 0.5). 0 turns it off."""
    suffix_first_rate: float = Field(default=0.5, ge=0, le=1)
    """Share of the rearranged documents in which the suffix comes first (SPM)."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    tokenizer: str = ""
    """sentencepiece model of `pangu tokenizer train`. Needed by fill-in-the-middle, generation and export;
    when given, every dataset must have been built with it."""
    domains: dict[str, DomainConfig] = Field(default_factory=dict)
    """Named parts of the corpus, mixed by the weights of each phase."""
    synthetic: bool = False
    """Train on an endless made-up token stream instead of domains; needs no files."""
    reset_at_documents: bool = True
    """Attention and positions start afresh at every document (Pangu: true)."""
    reset_positions: bool = True
    """Positions start afresh at every document even where attention does not (Yuan: true)."""
    fill_in_the_middle: FillInTheMiddleConfig = Field(default_factory=FillInTheMiddleConfig)
    """Rearrangement of documents into prefix, suffix and middle."""
    prefetch: int = Field(default=4, ge=0)
    """Micro-batches prepared ahead by a background thread. 0: prepared when asked for."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BatchSizeStep:
    tokens: int = Field(gt=0)
    """Tokens into the phase from which the size holds."""
    batch_size: int = Field(gt=0)
    """Sequences per optimizer step."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PhaseConfig:
    name: str = Field(min_length=1)
    """Shown in the console and in the events."""
    tokens: int | None = Field(default=None, gt=0)
    """Length of the phase. Only the last phase may leave it out: it then lasts until train.steps."""
    sequence_length: int = Field(gt=0)
    """Tokens per packed sequence."""
    batch_size: int = Field(gt=0)
    """Sequences per optimizer step, over all ranks and gradient-accumulation steps."""
    batch_size_ramp: tuple[BatchSizeStep, ...] = ()
    """Larger (or smaller) batches from given token counts on, in rising order."""
    learning_rate: float = Field(gt=0)
    """Rate at the end of the warm-up."""
    final_learning_rate: float | None = Field(default=None, ge=0)
    """Rate at the end of the phase, reached along a cosine over its tokens. Not given: constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the rate rises linearly from 0."""
    rope_base: float | None = Field(default=None, gt=0)
    """Base of the rotary frequencies. Not given: model.rope_base."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Share of sequences from each domain; normalized to 1. Empty: every domain alike."""
    curriculum: tuple[str, ...] = ()
    """Domains read in the order of their dataset (built with --sort-by difficulty) instead of shuffled."""

    def __post_init__(self) -> None:
        thresholds = [step.tokens for step in self.batch_size_ramp]
        if thresholds != sorted(set(thresholds)):
            raise ValueError(f"batch_size_ramp must have rising tokens, got {thresholds}")
        if any(weight < 0 for weight in self.weights.values()) or (self.weights and sum(self.weights.values()) <= 0):
            raise ValueError(f"weights must not be negative and must not all be 0, got {self.weights}")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimizerConfig:
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay per unit of learning rate."""
    decay_norm_gains: bool = True
    """Decay the norms' gains too (the Pangu Ultra report's figure 10 suggests it did; Megatron does not)."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm above which gradients are scaled down. 0: no clipping."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps of the whole run. Not given: until the last phase's tokens are spent."""
    seed: int = Field(default=0, ge=0)
    """Decides initial weights and data order."""
    micro_batch_size: int = Field(default=1, gt=0)
    """Sequences per forward pass; the rest of the batch is gradient accumulation."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of activations and matmuls. Weights, gradients and optimizer state are fp32 in both."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """auto: the accelerator PyTorch finds, or the CPU."""
    max_skipped_steps: int = Field(default=10, gt=0)
    """Steps in a row that may be skipped for a non-finite loss or gradient before training stops."""
    validation_interval: int = Field(default=0, ge=0)
    """Steps between validations; one also follows the last step. 0: never."""
    validation_sequences: int = Field(default=16, gt=0)
    """Held-out sequences per domain and validation."""
    deterministic: bool = True
    """Refuse operations whose result varies from run to run."""
    hang_seconds: float = Field(default=0.0, ge=0)
    """A step that takes longer leaves every rank's stacks and collectives in RUN/hangs, and the slowest rank is named
    on the console. Set it below parallel.timeout_seconds, which ends the job. 0: no bound."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RecomputeConfig:
    mode: Literal["none", "selective", "full"] | tuple[Literal["none", "selective", "full"], ...] = "none"
    """What backward computes again instead of keeping. selective: what norms and activations give to matmuls, which is
    cheap and needs no communication. full: whole layers. One value, or one per pipeline rank."""
    layers: tuple[int, ...] = ()
    """Recompute only the first so many layers of each of a rank's stages (Yuan 2.0's block recomputation): one number
    for every pipeline rank, or one each. Empty: all layers."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ParallelConfig:
    pp: int = Field(default=1, gt=0)
    """Pipeline stages' ranks: the layers are dealt over so many groups of devices."""
    dp_replicate: int = Field(default=1, gt=0)
    """Data-parallel groups that each hold a whole copy of parameters and optimizer state (HSDP's outer dimension)."""
    dp_shard: int = Field(default=0, ge=0)
    """Data-parallel ranks over which parameters, gradients and optimizer state are sharded. 0: all ranks that the other
    dimensions leave."""
    cp: int = Field(default=1, gt=0)
    """Context-parallel ranks: every document is dealt over so many."""
    tp: int = Field(default=1, gt=0)
    """Tensor-parallel ranks: heads, feed-forward width and vocabulary are dealt over so many."""
    sequence_parallel: bool = True
    """With tp: norms and the residual stream are sharded over tokens between the matmuls."""
    zero_stage: Literal[1, 2, 3] = 1
    """What dp_shard keeps sharded between micro-batches. 1: optimizer state. 2: gradients too. 3: parameters too."""
    context_exchange: Literal["ring", "all_gather"] = "ring"
    """With cp: how queries meet the keys of other ranks."""
    pipeline_schedule: Literal["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zero_bubble_v", "dualpipe_v"] = (
        "1f1b"
    )
    """Order of forward and backward passes. 1f1b has one stage per rank, the V-shaped ones exactly two, the interleaved
    ones pipeline_stages_per_rank."""
    pipeline_stages_per_rank: int = Field(default=1, gt=0)
    """Virtual stages (model chunks) per pipeline rank."""
    pipeline_layers: tuple[int, ...] = ()
    """Layers of every (virtual) stage in the model's order, pp x pipeline_stages_per_rank numbers. Empty: balanced,
    with the embedding and the head counted as load."""
    overlap: Literal["auto", "reference", "chunked", "fused"] = "auto"
    """With tp: how a matmul meets its collective. reference: one after the other. chunked: pieces of both at once.
    fused: the device's own fused operator (MC2 on Ascend, symmetric memory on CUDA)."""
    overlap_chunks: int = Field(default=4, gt=0)
    """Pieces of the chunked overlap."""
    devices_per_node: int = Field(default=8, gt=0)
    """Devices that share a node's fast links; only used to lay ranks out and to refuse slow layouts."""
    tp_across_nodes: bool = False
    """Allow a tensor-parallel group to span nodes, where its collectives are an order of magnitude slower."""
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """Longest wait for other ranks in a collective; the job ends when it has passed."""
    recompute: RecomputeConfig = Field(default_factory=RecomputeConfig)
    """Activation recomputation."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointConfig:
    interval: int = Field(default=100, ge=0)
    """Steps between checkpoints; one also follows the last step. 0: only that one."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    keep_last: int = Field(default=2, gt=0)
    """Complete checkpoints kept besides the milestones."""
    milestone_interval: int = Field(default=0, ge=0)
    """Checkpoints at multiples of this step are kept for ever. 0: none."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MetricsConfig:
    console_interval: int = Field(default=1, gt=0)
    """Steps between console lines. Every step goes to events.jsonl."""
    statistics_interval: int = Field(default=0, ge=0)
    """Steps between layer statistics (activations, norm gains). 0: never."""
    tensorboard: bool = True
    """Also write TensorBoard files under RUN/tensorboard."""
    peak_flops: float | None = Field(default=None, gt=0)
    """FLOP/s of one device that MFU divides by. Not given: the device's published peak, or on a CPU its measured
    matmul rate."""
    cluster: str = ""
    """Cluster description, a file or a name in launch/clusters: the step time, memory and MFU that `pangu plan`
    predicts for it stand beside the measured ones in the events. Empty: no predictions."""
    spike_window: int = Field(default=128, gt=1)
    """Steps whose mean and deviation decide whether a loss counts as a spike."""
    spike_deviations: float = Field(default=6.0, gt=0)
    """Standard deviations above that mean at which it does."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    model: ModelConfig
    """Architecture and initialization."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Where tokens come from and how they are packed."""
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    """Stages of training, in order."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW and gradient clipping."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The training loop."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the model and its data are dealt over devices."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving and retention."""
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    """What is measured and where it is shown."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        for phase in self.phases[:-1]:
            if phase.tokens is None:
                raise ValueError(f"phase {phase.name!r} has no tokens; only the last phase may leave them out")
        if self.phases[-1].tokens is None and self.train.steps is None:
            raise ValueError(f"the run has no end: give phase {self.phases[-1].name!r} its tokens, or set train.steps")
        if self.data.synthetic == bool(self.data.domains):
            raise ValueError("give either data.domains or data.synthetic = true")
        for phase in self.phases:
            self._check_phase(phase)
        if self.data.fill_in_the_middle.rate and not self.data.tokenizer:
            raise ValueError("data.fill_in_the_middle needs data.tokenizer")
        return self

    def _check_phase(self, phase: PhaseConfig) -> None:
        for batch_size in (phase.batch_size, *(step.batch_size for step in phase.batch_size_ramp)):
            if batch_size % self.train.micro_batch_size:
                raise ValueError(
                    f"phase {phase.name!r}: batch_size {batch_size} is not a multiple of train.micro_batch_size "
                    f"{self.train.micro_batch_size}"
                )
        for name in (*phase.weights, *phase.curriculum):
            if name not in self.data.domains:
                raise ValueError(
                    f"phase {phase.name!r} names domain {name!r}, which data.domains does not have"
                    + did_you_mean(name, self.data.domains)
                )


_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config by path or by the name of a file in `configs/`, apply `--section.field value` overrides, validate.

    Raises `ConfigError` naming the field and the fix.
    """
    tree = read_toml(find(source))
    for dotted, text in parse_overrides(overrides):
        _override(tree, dotted, text)
    return from_tree(tree, str(source))


def from_tree(tree: dict[str, Any], source: str) -> Config:
    """Validate plain dictionaries; `source` names them in the error."""
    return validate(_ADAPTER, Config, tree, source)


def validate(adapter: "TypeAdapter[T]", kind: type[T], tree: dict[str, Any], source: str) -> T:
    """Plain dictionaries as the dataclass `kind`; raises `ConfigError` naming `source`, the field and the fix."""
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        lines = [_explain(detail, kind) for detail in error.errors()]
        raise ConfigError(f"{source}: " + "\n  ".join(lines)) from None


def to_tree(config: Config) -> dict[str, Any]:
    """The resolved config as plain dictionaries without unset (null) fields: what TOML and checkpoints hold."""
    return _without_none(_ADAPTER.dump_python(config, mode="json"))


def find(source: str | Path) -> Path:
    """The file that a path or the bare name of a file in `configs/` means."""
    path = Path(source)
    if path.is_file():
        return path
    named = NAMED_CONFIGS / f"{source}.toml"
    if named.is_file():
        return named
    known = sorted(entry.stem for entry in NAMED_CONFIGS.glob("*.toml"))
    raise ConfigError(
        f"no config file {str(source)!r}{did_you_mean(path.stem, known)}; give a path, or one of: {', '.join(known)}"
    )


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--a.b value` and `--a.b=value` as (dotted field, text) pairs."""
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; a config field is set by --section.field value")
        dotted, equals, text = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise ConfigError(f"--{dotted} needs a value")
            text = following
        yield dotted, text


def _override(tree: dict[str, Any], dotted: str, text: str) -> None:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, field = dotted.split(".")
    node: Any = tree
    for section in sections:
        try:
            node = node[int(section)] if isinstance(node, list) else node.setdefault(section, {})
        except (ValueError, IndexError):
            raise ConfigError(f"--{dotted}: {section!r} is not an entry; phases are numbered from 0") from None
    if not isinstance(node, dict):
        raise ConfigError(f"--{dotted}: {sections[-1]!r} has no fields")
    node[field] = value


def _explain(detail: Any, kind: type) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "unexpected_keyword_argument":
            known = _fields_at(detail["loc"][:-1], kind)
            return (
                f"unknown field {where}{did_you_mean(str(detail['loc'][-1]), known)}; fields here: {', '.join(known)}"
            )
        case "missing":
            return f"{where} is missing"
        case "value_error":
            return f"{where}: {detail['ctx']['error']}" if where else str(detail["ctx"]["error"])
        case _:
            return f"{where} = {detail['input']!r}: {detail['msg']}"


def _fields_at(location: Sequence[Any], root: type) -> list[str]:
    """Field names of the dataclass at a pydantic error location inside `root`."""
    kind: Any = root
    for part in location:
        if dataclasses.is_dataclass(kind):
            kind = next((f.type for f in dataclasses.fields(kind) if f.name == part), None)
        else:
            kind = _member(kind)
    kind = kind if dataclasses.is_dataclass(kind) else _member(kind)
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _member(kind: Any) -> Any:
    """The dataclass inside a tuple, dictionary or optional type."""
    return next((arg for arg in getattr(kind, "__args__", ()) if dataclasses.is_dataclass(arg)), kind)


def did_you_mean(word: str, known: Any) -> str:
    """A hint in brackets at the nearest of the `known` words, or nothing."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _without_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    if isinstance(tree, list):
        return [_without_none(value) for value in tree]
    return tree


def show(config: Any) -> str:
    """A config, or a dataclass of its style, as commented TOML that reads back to an equal one."""
    lines: list[str] = []
    _show(config, (), lines)
    return "\n".join(lines).strip() + "\n"


def _show(node: Any, path: tuple[str, ...], lines: list[str]) -> None:
    descriptions = {name: info.description for name, info in type(node).__pydantic_fields__.items()}
    nested = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        text = " ".join((descriptions[field.name] or "").split())
        if dataclasses.is_dataclass(value) or _holds_dataclasses(value):
            nested.append((field.name, value, text))
        else:
            lines.append(f"# {text}")
            lines.append(f"{'# ' if value is None else ''}{field.name} = {_toml(value)}")
    for name, value, text in nested:
        if isinstance(value, tuple):
            for item in value:
                lines += ["", f"# {text}", f"[[{'.'.join((*path, name))}]]"]
                _show(item, (*path, name), lines)
        elif isinstance(value, dict):
            for key, item in value.items():
                quoted = key if key.isascii() and key.replace("_", "").replace("-", "").isalnum() else _toml(key)
                lines += ["", f"# {text}", f"[{'.'.join((*path, name, quoted))}]"]
                _show(item, (*path, name, quoted), lines)
        else:
            lines += ["", f"# {text}", f"[{'.'.join((*path, name))}]"]
            _show(value, (*path, name), lines)


def _holds_dataclasses(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return any(dataclasses.is_dataclass(item) for item in items)


def _toml(value: Any) -> str:
    if value is None:
        return "(not set)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return repr(value)
