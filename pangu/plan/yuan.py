"""The two closed-form performance models of Yuan 2.0 (arXiv 2311.15786, section 3.4, appendices C and D), as printed.

Method 1 is tensor + pipeline + data parallelism; method 2 a non-uniform pipeline with sharded optimizer state and no
tensor parallelism. Both assume activation recomputation of every layer and four bytes per gradient. Each comes for a
GPT-like layer (attention 4 H^2, feed-forward 8 H^2) and for Yuan's (attention 4 H^2, SwiGLU of width 4 H, 12 H^2; the
two convolutions of LFA, 2 H^2, are not counted by the paper).

Three misprints matter:

- Equations 3 and 4 (method 2) lack the factor A, the accumulation steps, in T0: verbatim they give the time of one
  micro-batch. With it they give the paper's Table 6. `accumulation_in_compute=False` restores the printed form.
- Equations 1 and 3 print 1 + 1/(6H) where the count of floating-point operations has 1 + S/(6H). The printed form is
  the one Table 5 was made with: its 36.666 s correspond to the stated 55.4% of an A100's peak only so.
- Appendix C prints 4 and 24 where the text has 8 and 48 in T2 and T3. Table 5 needs 8, and 48 with a bidirectional
  figure for the links inside a node (24 with one direction).
"""

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["gpt", "lfa"]


@dataclass(frozen=True)
class Setting:
    """The symbols of the paper, spelled out."""

    accumulation_steps: int
    """A: micro-batches of one step on one data-parallel rank."""
    micro_batch_size: int
    """B: sequences."""
    num_layers: int
    """L."""
    sequence_length: int
    """S."""
    hidden_size: int
    """H."""
    vocab_size: int
    """V."""
    pp: int
    """P."""
    tp: int
    """T. Method 2 has none."""
    dp: int
    """D."""
    chip_flops: float
    """F: FLOP/s that one chip sustains on a small model of the same architecture, not its peak."""
    link_bandwidth: float
    """BW_link: bytes per second between chips of a node."""
    network_bandwidth: float
    """BW_net: bytes per second of one network adapter."""
    adapters: float = 1
    """n_net: network adapters."""

    @property
    def network(self) -> float:
        """n_net x BW_net."""
        return self.adapters * self.network_bandwidth


@dataclass(frozen=True)
class Terms:
    """Seconds of one optimizer step, in the order in which the paper adds them up."""

    compute: float
    bubble: float
    pipeline: float
    """Activations and their gradients between stages."""
    tensor: float
    """Collectives inside layers (method 1)."""
    optimizer: float
    """Collectives of sharded optimizer state (method 2)."""
    data: float
    """Gradients over data-parallel ranks."""

    @property
    def total(self) -> float:
        return self.compute + self.bubble + self.pipeline + self.tensor + self.optimizer + self.data


def method_1(setting: Setting, layer: LayerKind = "lfa") -> Terms:
    """Equation 1 (gpt) or 2 (lfa): tensor, pipeline and data parallelism."""
    s = setting
    compute = s.accumulation_steps * _compute(s, layer) / s.tp
    volume = _activation_volume(s)
    tensor_factor = {"gpt": 48, "lfa": 64}[layer]
    return Terms(
        compute=compute,
        bubble=compute * (s.pp - 1) / s.accumulation_steps,
        pipeline=8 * volume / s.network,
        tensor=tensor_factor * s.num_layers * (s.tp - 1) / (s.pp * s.tp * s.link_bandwidth) * volume,
        optimizer=0.0,
        data=_parameters(s, layer) * 4 * (s.dp - 1) / s.dp / (s.pp * s.network),
    )


def method_2(setting: Setting, layer: LayerKind = "lfa", accumulation_in_compute: bool = True) -> Terms:
    """Equation 3 (gpt) or 4 (lfa): non-uniform pipeline, data parallelism and sharded optimizer state.

    T2 divides by adapters x link_bandwidth, as printed, although stages talk over the network.
    """
    s = setting
    compute = (s.accumulation_steps if accumulation_in_compute else 1) * _compute(s, layer)
    parameters = _parameters(s, layer)
    share = (s.dp - 1) / s.dp / (s.pp * s.network)
    return Terms(
        compute=compute,
        bubble=compute * (s.pp - 1) / s.accumulation_steps,
        pipeline=8 * _activation_volume(s) / (s.adapters * s.link_bandwidth),
        tensor=0.0,
        optimizer=parameters * 8 * share,
        data=parameters * 4 * share,
    )


def _compute(s: Setting, layer: LayerKind) -> float:
    """T0 of one micro-batch on one pipeline stage: 8 FLOPs per weight and token, recomputation included."""
    tokens_layers = s.micro_batch_size * s.num_layers * s.sequence_length * s.hidden_size**2
    if layer == "gpt":
        return 96 * tokens_layers * (1 + 1 / (6 * s.hidden_size)) / (s.pp * s.chip_flops)
    return 128 * tokens_layers * (1 + s.sequence_length / (8 * s.hidden_size)) / (s.pp * s.chip_flops)


def _activation_volume(s: Setting) -> float:
    """A B S H: values of one layer's output over all micro-batches of a rank."""
    return s.accumulation_steps * s.micro_batch_size * s.sequence_length * s.hidden_size


def _parameters(s: Setting, layer: LayerKind) -> float:
    """Parameters of the model; the LFA form as printed, with its S and H terms."""
    layers, hidden, vocab = s.num_layers, s.hidden_size, s.vocab_size
    if layer == "gpt":
        return 12 * layers * hidden**2 * (1 + 13 / (12 * hidden) + vocab / (12 * layers * hidden))
    length = s.sequence_length
    return (
        16
        * layers
        * hidden**2
        * (1 + (1 + length) / (4 * hidden) + length / (16 * hidden**2) + vocab / (16 * layers * hidden))
    )
