"""One fp32 training step of the same Llama-like model in Pangu, in a plain PyTorch loop and in transformers, on a CPU.

    python benchmarks/train_step.py [--rounds 7] [--output train_step.json]

The three take turns in one run, so that their ratios hold when the machine's speed drifts; each figure is the median
over rounds. `matmuls` is the time of the step's matrix products alone: what no implementation can beat.
Activation memory is the peak of a step in a process of its own, less weights, gradients and optimizer state.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pangu.config import ModelConfig, OptimizerConfig

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Case:
    name: str
    vocab_size: int
    tokens: int
    hidden_size: int = 512
    num_layers: int = 8
    num_attention_heads: int = 8
    intermediate_size: int = 1408

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        stream = torch.randint(self.vocab_size, (self.tokens + 1,), generator=generator)
        return stream[:-1], stream[1:]


CASES = {
    case.name: case
    for case in (Case("58M", vocab_size=32_000, tokens=512), Case("large vocabulary", vocab_size=153_376, tokens=2048))
}


def pangu_step(case: Case) -> tuple[Callable[[], float], int]:
    from pangu.model import Transformer, init_weights
    from pangu.parallel.gradients import squared_norm
    from pangu.train.optimizer import AdamW, clip_scale

    model = Transformer(
        ModelConfig(
            vocab_size=case.vocab_size,
            hidden_size=case.hidden_size,
            num_layers=case.num_layers,
            num_attention_heads=case.num_attention_heads,
            intermediate_size=case.intermediate_size,
            norm_placement="pre",
        )
    )
    init_weights(model, seed=0)
    optimizer = AdamW(model.named_parameters(), OptimizerConfig())
    tokens, labels = case.batch()
    positions, cu_seqlens = torch.arange(case.tokens), torch.tensor([0, case.tokens], dtype=torch.int32)
    loss_weights = torch.full((case.tokens,), 1 / case.tokens)
    updates = 0

    def step() -> float:
        nonlocal updates
        updates += 1
        loss, _ = model.loss(tokens, labels, positions, cu_seqlens, loss_weights)
        loss.backward()
        norm = squared_norm(optimizer.parameters, {}).sqrt()
        optimizer.step(updates, LEARNING_RATE, clip_scale(norm, 1.0))
        optimizer.zero_grad()
        return loss.item()

    return step, sum(parameter.numel() for parameter in model.parameters())


class PlainBlock(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        hidden = case.hidden_size
        self.heads = case.num_attention_heads
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(hidden, 1e-5), nn.RMSNorm(hidden, 1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, case.intermediate_size, bias=False) for _ in range(2))
        self.down = nn.Linear(case.intermediate_size, hidden, bias=False)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.attention_norm(h)
        q, k, v = (linear(x).view(1, len(x), self.heads, -1).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.o(y.transpose(1, 2).reshape(h.shape))
        x = self.feed_forward_norm(h)
        return h + self.down(F.silu(self.gate(x)) * self.up(x))


class PlainModel(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embedding = nn.Embedding(case.vocab_size, case.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(case) for _ in range(case.num_layers))
        self.norm = nn.RMSNorm(case.hidden_size, 1e-5)
        self.head = nn.Linear(case.hidden_size, case.vocab_size, bias=False)
        head_dim = case.hidden_size // case.num_attention_heads
        frequencies = 10_000 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(case.tokens)[:, None] * torch.cat((frequencies, frequencies))
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        return self.head(self.norm(h))


def plain_step(case: Case) -> tuple[Callable[[], float], int]:
    torch.manual_seed(0)
    model = PlainModel(case)
    return _torch_step(case, model, lambda tokens, labels: F.cross_entropy(model(tokens), labels))


def transformers_step(case: Case) -> tuple[Callable[[], float], int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=case.vocab_size,
            hidden_size=case.hidden_size,
            num_hidden_layers=case.num_layers,
            num_attention_heads=case.num_attention_heads,
            intermediate_size=case.intermediate_size,
            max_position_embeddings=case.tokens,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    return _torch_step(
        case, model, lambda tokens, labels: model(tokens[None], labels=labels[None], shift_labels=labels[None]).loss
    )


def _torch_step(
    case: Case, model: nn.Module, compute_loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Callable[[], float], int]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens, labels = case.batch()

    def step() -> float:
        loss = compute_loss(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, sum(parameter.numel() for parameter in model.parameters())


def matmuls(case: Case) -> Callable[[], float]:
    """The products of one step: forward, gradient of the input and of the weight, and attention's.

    Every layer has weights of its own, as in the step: one layer's again and again would come from the cache.
    """
    hidden, heads, tokens = case.hidden_size, case.num_attention_heads, case.tokens
    layer = [(hidden, hidden)] * 4 + [(hidden, case.intermediate_size)] * 2 + [(case.intermediate_size, hidden)]
    weights = [torch.randn(outputs, inputs) for inputs, outputs in layer * case.num_layers]
    weights.append(torch.randn(case.vocab_size, hidden))
    activations = {size: torch.randn(tokens, size) for size in {hidden, case.intermediate_size, case.vocab_size}}
    scores = torch.randn(heads, tokens, tokens)
    head = torch.randn(heads, tokens, hidden // heads)

    def run() -> float:
        for weight in weights:
            gradient, x = (activations[size] for size in weight.shape)
            torch.mm(x, weight.T)
            torch.mm(gradient, weight)
            torch.mm(gradient.T, x)
        # Two products forward and four backward, half of each under a causal mask.
        for _ in range(3 * case.num_layers):
            torch.bmm(scores, head)
        return 0.0

    return run


STEPS = {"pangu": pangu_step, "plain": plain_step, "transformers": transformers_step}


def time_steps(case: Case, threads: int, rounds: int) -> dict[str, float]:
    """Median seconds of each implementation and of the matmuls alone."""
    torch.set_num_threads(threads)
    runs: dict[str, Callable[[], float]] = {name: make(case)[0] for name, make in STEPS.items()}
    runs["matmuls"] = matmuls(case)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_memory(name: str, case: Case) -> int:
    """Peak resident bytes of a step less what stays: weights, gradients and moments. Meant for a process of its own."""
    if name == "transformers":
        import transformers  # noqa: F401
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))
    before = _status("VmRSS")
    step, num_parameters = STEPS[name](case)
    step()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return _status("VmHWM") - before - 16 * num_parameters


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", nargs=2, metavar=("IMPLEMENTATION", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(measure_memory(options.memory_of[0], CASES[options.memory_of[1]]))
        return
    rows: list[dict[str, Any]] = []
    print(
        f"{'case':<18}{'threads':>8}{'pangu tok/s':>13}{'plain':>9}{'transformers':>14}"
        f"{'/plain':>8}{'/tf':>7}{'matmuls':>9}"
    )
    for name in options.case:
        case = CASES[name]
        for threads in options.threads:
            seconds = time_steps(case, threads, options.rounds)
            row = {
                "case": name,
                "threads": threads,
                "tokens_per_second": {key: case.tokens / value for key, value in seconds.items() if key in STEPS},
                "ratio_to_plain": seconds["plain"] / seconds["pangu"],
                "ratio_to_transformers": seconds["transformers"] / seconds["pangu"],
                "matmul_share": seconds["matmuls"] / seconds["pangu"],
            }
            rows.append(row)
            rates = row["tokens_per_second"]
            print(
                f"{name:<18}{threads:>8}{rates['pangu']:>13.1f}{rates['plain']:>9.1f}{rates['transformers']:>14.1f}"
                f"{row['ratio_to_plain']:>8.3f}{row['ratio_to_transformers']:>7.3f}{row['matmul_share']:>9.1%}",
                flush=True,
            )
    memory: dict[str, dict[str, int]] = {}
    for name in options.case:
        memory[name] = {
            implementation: int(
                subprocess.run(
                    [sys.executable, __file__, "--memory-of", implementation, name],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout.split()[-1]
            )
            for implementation in STEPS
        }
        cells = "  ".join(f"{key} {value / 2**20:.0f} MiB" for key, value in memory[name].items())
        ratio = memory[name]["pangu"] / memory[name]["transformers"]
        print(f"activation memory, {name}: {cells}  pangu/transformers {ratio:.2f}")
    if options.output:
        options.output.write_text(json.dumps({"speed": rows, "activation_memory_bytes": memory}, indent=2) + "\n")


if __name__ == "__main__":
    main()
