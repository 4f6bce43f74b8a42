"""Every operator by every implementation this device has: time, rate, share of what the device can do, memory.

    python benchmarks/kernels.py [--device cpu] [--operator sandwich_norm] [--output kernels.json] [--plot kernels.png]

Implementations take turns; each figure is the fastest of the rounds. GB/s counts every input read and every output
written once, FLOP/s the products that have to be made (attention: half of all pairs); their share is of the rate at
which this device copies, or multiplies large matrices, measured here. Memory is the peak of a forward and backward pass
beyond its inputs: of PyTorch's allocations on a CPU (its profiler counts them), of the allocator on an accelerator.

`eager` is plain PyTorch with PyTorch's gradients; `compile` (with --compile) is that under torch.compile. What would
not fit into memory or into --seconds is skipped, and said. Small inputs stay in a CPU's caches, so that shares of the
copy rate may pass 100%. Operators that communicate are not measured here.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when torch is loaded: its profiler otherwise talks at every start

import pangu  # keeps torch from loading torch_npu by itself

# isort: split
import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from kernel_cases import OPERATORS, Operator, Run, Shape, Work

from pangu import config as configuration
from pangu.config import ModelConfig
from pangu.device import select, synchronize

LAPTOP = ModelConfig(vocab_size=32_000, hidden_size=512, num_layers=8, num_attention_heads=8, intermediate_size=1408)
TARGETS = {"sandwich_norm": 1.5, "linear_cross_entropy time": 1.15, "linear_cross_entropy memory": 0.15}
_SHORTEST_SAMPLE = 5e-3


@dataclass(frozen=True)
class Device:
    device: torch.device
    dtype: torch.dtype
    copy_bytes_per_second: float
    matmul_flops: float

    def seconds(self, work: Work) -> float:
        """At full speed."""
        return work.bytes / self.copy_bytes_per_second + work.flops / self.matmul_flops

    def share(self, work: Work, seconds: float) -> float:
        return self.seconds(work) / seconds


def shapes(tokens: list[int]) -> dict[str, list[Shape]]:
    ultra = configuration.load("pangu_ultra_135b").model
    return {
        "laptop": [Shape("laptop", LAPTOP, number) for number in tokens],
        "135B": [Shape("135B", ultra, number) for number in tokens],
        "large vocabulary": [Shape("large vocabulary", replace(LAPTOP, vocab_size=ultra.vocab_size), 2048)],
    }


def measured_device(device: torch.device, dtype: torch.dtype, emulated: bool) -> Device:
    size = 128 if emulated else 2048 if device.type == "cpu" else 8192
    left, right = torch.ones(2, size, size, dtype=dtype, device=device)
    product = torch.empty_like(left)
    source = torch.ones(2**30 if device.type != "cpu" and not emulated else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(left, right, out=product),
    }
    seconds = fastest(runs, 5, device)
    return Device(device, dtype, 2 * source.nbytes / seconds["copy"], 2 * size**3 / seconds["matmul"])


def fastest(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds per call. Short calls are repeated until a sample is long enough to be timed."""
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, round(_SHORTEST_SAMPLE / _timed(run, 1, device)))
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], _timed(run, repeats[name], device))
    return best


def _timed(run: Run, repeats: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def peak_memory(run: Run, device: torch.device) -> int:
    """Bytes allocated at once by one call."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes), default=0)


def reason_to_skip(operator: Operator, shape: Shape, device: Device, options: argparse.Namespace) -> str | None:
    needed, free = operator.memory(shape, device.dtype.itemsize), free_memory(device.device)
    if needed > 0.8 * free:
        return f"takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    seconds = 3 * (options.rounds + 2) * 2 * device.seconds(operator.work(shape, device.dtype.itemsize)[1])
    if seconds > options.seconds:
        return f"takes {seconds:.0f} s or more, --seconds is {options.seconds}"
    return None


def free_memory(device: torch.device) -> int:
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def measure(operator: Operator, shape: Shape, device: Device, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    case = operator.make(shape, device.dtype, device.device)
    runs = dict(case.runs)
    if options.compile:
        runs["compile"] = tuple(torch.compile(run) for run in runs["eager"])
    forward = fastest({name: pair[0] for name, pair in runs.items()}, options.rounds, device.device)
    both = fastest({name: pair[1] for name, pair in runs.items()}, options.rounds, device.device)
    for name, (_, run) in runs.items():
        unit = "flops" if case.both.flops else "bytes"
        yield {
            "operator": operator.name,
            "shape": shape.name,
            "tokens": shape.tokens,
            "implementation": name,
            "forward_seconds": forward[name],
            "seconds": both[name],
            "speedup_over_eager": both["eager"] / both[name],
            f"{unit}_per_second": getattr(case.both, unit) / both[name],
            "forward_share": device.share(case.forward, forward[name]),
            "share": device.share(case.both, both[name]),
            "peak_memory_bytes": peak_memory(run, device.device),
        }


def run_all(device: Device, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    print(
        f"\n{'operator':<22}{'shape':<18}{'tokens':>7}  {'implementation':<15}{'fwd ms':>10}{'fwd+bwd':>10}"
        f"{'x eager':>9}{'rate':>15}{'share':>8}{'memory':>12}"
    )
    for operator in OPERATORS:
        if options.operator and operator.name not in options.operator:
            continue
        for shape in (shape for name in options.shapes for shape in shapes(options.tokens)[name]):
            if shape.name == "large vocabulary" and operator.name != "linear_cross_entropy":
                continue
            reason = reason_to_skip(operator, shape, device, options)
            if reason is not None:
                skipped.append({"operator": operator.name, "shape": shape.name, "tokens": shape.tokens, "why": reason})
                print(f"{operator.name:<22}{shape.name:<18}{shape.tokens:>7}  skipped: {reason}")
                continue
            for row in measure(operator, shape, device, options):
                rows.append(row)
                print_row(row)
    return rows, skipped


def print_row(row: dict[str, Any]) -> None:
    flops, traffic = row.get("flops_per_second"), row.get("bytes_per_second", 0.0)
    rate = f"{traffic / 1e9:.1f} GB/s" if flops is None else f"{flops / 1e9:.0f} GFLOP/s"
    print(
        f"{row['operator']:<22}{row['shape']:<18}{row['tokens']:>7}  {row['implementation']:<15}"
        f"{row['forward_seconds'] * 1e3:>10.3f}{row['seconds'] * 1e3:>10.3f}{row['speedup_over_eager']:>9.2f}"
        f"{rate:>15}{row['share']:>8.0%}{row['peak_memory_bytes'] / 2**20:>8.1f} MiB",
        flush=True,
    )


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the CPU is held to: the compiled kernels against separate operations, at the shapes of the targets."""

    def pair(operator: str, shape: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        chosen = [row for row in rows if (row["operator"], row["shape"]) == (operator, shape)]
        ours = [row for row in chosen if row["implementation"] == "cpu"]
        return [(row, next(e for e in chosen if e["tokens"] == row["tokens"])) for row in ours]  # eager comes first

    def result(name: str, value: float, is_reached: bool) -> dict[str, Any]:
        return {"name": name, "value": value, "target": TARGETS[name], "reached": is_reached}

    results = []
    for ours, eager in pair("sandwich_norm", "laptop"):
        ratio = eager["seconds"] / ours["seconds"]
        results.append(result("sandwich_norm", ratio, ratio >= TARGETS["sandwich_norm"]) | {"tokens": ours["tokens"]})
    for ours, eager in pair("linear_cross_entropy", "large vocabulary"):
        for name, key in (("time", "seconds"), ("memory", "peak_memory_bytes")):
            name, ratio = f"linear_cross_entropy {name}", ours[key] / eager[key]
            results.append(result(name, ratio, ratio <= TARGETS[name]) | {"tokens": ours["tokens"]})
    return results


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of the device's rate over the number of tokens, a panel per operator and shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["operator"] for row in rows))
    columns = list(dict.fromkeys(row["shape"] for row in rows if row["shape"] != "large vocabulary"))
    figure, panels = pyplot.subplots(
        len(names), len(columns), figsize=(5 * len(columns), 2.6 * len(names)), squeeze=False, layout="constrained"
    )
    for line, name in enumerate(names):
        for column, shape in enumerate(columns):
            panel = panels[line][column]
            chosen = [row for row in rows if (row["operator"], row["shape"]) == (name, shape)]
            for implementation in dict.fromkeys(row["implementation"] for row in chosen):
                points = [row for row in chosen if row["implementation"] == implementation]
                panel.plot(
                    [row["tokens"] for row in points],
                    [row["share"] for row in points],
                    marker="o",
                    label=implementation,
                )
            panel.set_title(f"{name}, {shape}", fontsize="small")
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            if chosen:
                panel.legend(fontsize="x-small")
            else:
                panel.text(0.5, 0.5, "skipped", transform=panel.transAxes, ha="center")
    figure.supxlabel("tokens")
    figure.supylabel("forward and backward: share of the device's copy or matmul rate")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or npu")
    parser.add_argument("--emulate", action="store_true", help="with --device npu: does it run? times mean nothing")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: fp32 on a CPU, else bf16")
    parser.add_argument("--operator", nargs="+", choices=[operator.name for operator in OPERATORS])
    parser.add_argument("--shapes", nargs="+", choices=("laptop", "135B", "large vocabulary"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=120, help="longest time for one operator on one shape")
    parser.add_argument("--threads", type=int, help="on a CPU")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the eager form: minutes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.shapes = options.shapes or ["laptop", "135B", "large vocabulary"]
    return options


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.emulate:
        from pangu.device import cann_emulator

        cann_emulator.install(num_devices=1)
    chosen = select(options.device)
    is_fp32 = options.dtype == "fp32" or (options.dtype is None and chosen.type == "cpu")
    device = measured_device(
        chosen, torch.float32 if is_fp32 else torch.bfloat16, options.emulate or chosen.type == "cpu"
    )
    threads = f", {torch.get_num_threads()} threads" if chosen.type == "cpu" else ""
    print(
        f"{chosen}, {device.dtype}{threads}: copy {device.copy_bytes_per_second / 1e9:.1f} GB/s, "
        f"matmul {device.matmul_flops / 1e9:.0f} GFLOP/s{', EMULATED: times mean nothing' if options.emulate else ''}"
    )
    rows, skipped = run_all(device, options)
    reached = targets(rows) if chosen.type == "cpu" else []
    for each in reached:
        print(f"{each['name']}, {each['tokens']} tokens: {each['value']:.2f}x (target {each['target']})")
    if options.output:
        result: dict[str, Any] = {
            "pangu": pangu.__version__,
            "device": str(chosen),
            "dtype": str(device.dtype),
            "threads": torch.get_num_threads() if chosen.type == "cpu" else None,
            "emulated": options.emulate,
            "copy_bytes_per_second": device.copy_bytes_per_second,
            "matmul_flops": device.matmul_flops,
            "rows": rows,
            "skipped": skipped,
            "targets": reached,
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
