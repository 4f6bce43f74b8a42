"""How far `pangu plan predict` is off, on published measurements of training steps.

    python benchmarks/planner_accuracy.py [ROWS.yaml] [--leave-one-out] [--fit] [--output FILE.json]

Step times: mean absolute error (MAPE), signed bias and 90th percentile per source family and per vendor; with
--leave-one-out also the MAPE on each family by constants fitted without it (one linearization of the errors at the full
fit; what is left out is predicted in full). Beside it two predictors without any
physics: the median MFU of the vendor's other families, and the MFU of the most similar row of another family. Ranks
(Spearman) of layouts of one model on one machine. Memory per rank, and verdicts on what fits.

--fit fits the constants of pangu/plan/efficiency.toml to the rows and writes the file. The fit is a maximum a
posteriori one: squared logarithms of prediction / measurement, beyond 12 % linear (Huber), and squared distances of the
constants' logarithms from what was measured elsewhere or is typical (`PRIORS`), in units of how far that is trusted.
Rows that do not define their layout (no micro-batch, no chip variant) take no part in anything.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from pangu.errors import PanguError
from pangu.files import write_atomically
from pangu.plan.conventions import HARDWARE_FULL, MODEL_FULL, flops_per_token
from pangu.plan.efficiency import FITTED, Efficiency, efficiency_of, fitted
from pangu.plan.memory import memory
from pangu.plan.predict import load_rows
from pangu.plan.rows import Row, Undefined, read_row
from pangu.plan.time import step_time

ROWS = Path(__file__).resolve().parent.parent / "tests" / "plan" / "rows" / "published.yaml"
NVIDIA = ("a100", "h100", "b200")
SOFTWARE = "deepspeed_layer_ms"

# Constant, chip families that share it, value expected before seeing any row, trust (standard deviation of its
# logarithm), and where it is from.
PRIORS: tuple[tuple[str, tuple[str, ...], float, float, str], ...] = (
    ("matmul", ("ascend",), 0.75, 0.15, "limulidae README: 0.93 in bursts; less when sustained"),
    ("matmul", ("a100",), 0.80, 0.15, "SimuMax: 0.75 on a 300 W A100, whose limit is 400 W here"),
    ("matmul", ("h100",), 0.70, 0.15, "SimuMax's h100_nvlink.json"),
    ("matmul", ("b200",), 0.49, 0.15, "SimuMax's b200_bf16_ceperm.json, median of 514"),
    ("attention_forward", ("ascend",), 0.50, 0.15, "typical"),
    ("attention_forward", ("a100",), 0.56, 0.15, "SimuMax's a100_pcie.json, 32 heads"),
    ("attention_forward", ("h100",), 0.40, 0.15, "FlashAttention-2 on H100"),
    ("attention_forward", ("b200",), 0.50, 0.15, "SimuMax's b200_bf16_ceperm.json, 128 heads"),
    ("attention_backward", ("ascend",), 0.45, 0.15, "typical"),
    ("attention_backward", ("a100",), 0.49, 0.15, "SimuMax's a100_pcie.json, 32 heads"),
    ("attention_backward", ("h100",), 0.30, 0.15, "FlashAttention-2 on H100"),
    ("attention_backward", ("b200",), 0.40, 0.15, "SimuMax's b200_bf16_ceperm.json"),
    ("memory", ("ascend",), 0.40, 0.15, "limulidae README: 640 of 1600 GB/s element-wise"),
    ("memory", ("a100",), 0.90, 0.15, "SimuMax's a100_pcie.json: 0.91"),
    ("memory", ("h100",), 0.85, 0.15, "SimuMax's h100_nvlink.json"),
    ("memory", ("b200",), 0.666, 0.15, "SimuMax's b200_bf16_ceperm.json"),
    ("intra_node", ("ascend",), 0.62, 0.2, "limulidae README: 0.54 to 0.68 of the links"),
    ("intra_node", NVIDIA, 0.70, 0.2, "SimuMax's b200_bf16_ceperm.json: 0.67 to 0.74"),
    ("inter_node", ("ascend",), 0.70, 0.3, "typical"),
    ("inter_node", NVIDIA, 0.70, 0.3, "typical"),
    ("overlap", ("ascend",), 0.80, 0.2, "typical"),
    ("overlap", NVIDIA, 0.80, 0.2, "typical"),
    ("operator_us", ("ascend",), 20.0, 0.6, "typical"),
    ("operator_us", NVIDIA, 8.0, 0.6, "typical"),
    ("step_ms", ("ascend",), 50.0, 1.0, "typical"),
    ("step_ms", NVIDIA, 20.0, 1.0, "typical"),
    (SOFTWARE, ("software",), 1.0, 1.0, "unknown"),
)
SHARES = ("matmul", "attention_forward", "attention_backward", "memory", "intra_node", "inter_node", "overlap")
NOISE = 0.05
"""Expected error of a perfect model on one row: what weighs rows against priors."""
HUBER = 0.12
PRIOR_LOGS = np.log([value for _, _, value, *_ in PRIORS])
PRIOR_WEIGHTS = (NOISE / np.array([trust for _, _, _, trust, _ in PRIORS])) ** 2


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A row with a step time."""

    id: str
    family: str
    row: Row
    seconds: float

    @property
    def chip(self) -> str:
        return self.row.cluster.chip.family

    @property
    def vendor(self) -> str:
        return "Ascend" if self.chip == "ascend" else "NVIDIA"

    @property
    def is_deepspeed(self) -> bool:
        return self.row.job.framework.name == "megatron-deepspeed"

    def predicted(self, constants: dict[str, Efficiency], layer_ms: float) -> float:
        job, cluster = self.row.job, dataclasses.replace(self.row.cluster, efficiency=constants[self.chip])
        if self.is_deepspeed:
            job = dataclasses.replace(job, framework=dataclasses.replace(job.framework, layer_ms=layer_ms))
        return step_time(job, cluster).step

    def mfu(self, seconds: float) -> float:
        job = self.row.job
        flops = flops_per_token(job.model, job.sequence_length, MODEL_FULL) * job.tokens
        return flops / (seconds * self.row.chips * self.row.cluster.chip.peak_flops("bf16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", metavar="ROWS", nargs="?", type=Path, default=ROWS)
    parser.add_argument("--leave-one-out", action="store_true", help="fit without each family and predict it")
    parser.add_argument("--fit", action="store_true", help="fit the constants to ROWS first, and write them")
    parser.add_argument("--output", metavar="FILE", type=Path, help="all figures as JSON")
    options = parser.parse_args()
    rows, hardware = load_rows(options.rows)
    measurements = list(measured_times(rows, hardware))
    values = np.array([_current(name, families) for name, families, *_ in PRIORS])
    if options.fit:
        values = fit(measurements, np.array([prior for _, _, prior, *_ in PRIORS]))
        write_constants(values)
    report: dict[str, Any] = {"date": str(date.today()), "rows": len(rows), "fitted_constants": len(PRIORS)}
    report["step_time"] = time_report(measurements, values, options.leave_one_out)
    report["rank_correlation"] = rank_report(measurements, values)
    report["memory"], report["fits"] = memory_report(rows, hardware)
    print_report(report)
    if options.output:
        write_atomically(options.output, json.dumps(report, indent=1))


def measured_times(rows: Sequence[dict[str, Any]], hardware: dict[str, Any]) -> Iterator[Measurement]:
    """Rows that define their layout and whose step time was measured, or follows from what was."""
    for row in rows:
        try:
            read = read_row(row, hardware)
        except (Undefined, PanguError):
            continue
        seconds = measured_seconds(row, read)
        if seconds and not read.no_time and read.cluster.chip.family != "v100":
            yield Measurement(str(row["id"]), str(row.get("family")), read, seconds)


def measured_seconds(row: dict[str, Any], read: Row) -> float | None:
    measured, job = row.get("measured") or {}, read.job
    if measured.get("step_time_s") or (row.get("derived") or {}).get("step_time_s"):
        return measured.get("step_time_s") or row["derived"]["step_time_s"]
    if measured.get("tokens_per_s_per_chip"):
        return job.tokens / (measured["tokens_per_s_per_chip"] * read.chips)
    if measured.get("tflops_per_chip") and "hardware" in str(measured.get("flops_convention")):
        flops = flops_per_token(job.model, job.sequence_length, HARDWARE_FULL) * job.tokens
        return flops / (measured["tflops_per_chip"] * 1e12 * read.chips)
    return None


def _current(name: str, families: tuple[str, ...]) -> float:
    return fitted()["software"][name] if name == SOFTWARE else getattr(efficiency_of(families[0]), name)


def constants_of(values: np.ndarray) -> tuple[dict[str, Efficiency], float]:
    """The constants by chip family, and that of DeepSpeed."""
    tables: dict[str, dict[str, float]] = {family: {} for family in ("ascend", *NVIDIA, "software")}
    for (name, families, *_), value in zip(PRIORS, values, strict=True):
        for family in families:
            tables[family][name] = min(1.0, float(value)) if name in SHARES else float(value)
    layer_ms = tables.pop("software")[SOFTWARE]
    return {family: Efficiency(**table) for family, table in tables.items()}, layer_ms


def log_errors(measurements: Sequence[Measurement], values: np.ndarray) -> np.ndarray:
    constants, layer_ms = constants_of(values)
    return np.array([math.log(each.predicted(constants, layer_ms) / each.seconds) for each in measurements])


def fit(measurements: Sequence[Measurement], start: np.ndarray, steps: int = 8) -> np.ndarray:
    """Constants of largest posterior probability, by damped Gauss-Newton steps in their logarithms."""
    x = np.log(start)
    errors = log_errors(measurements, np.exp(x))
    best, damping = _cost(errors, x), 1e-3
    for _ in range(steps):
        slopes = _slopes(measurements, x, errors)
        before = best
        while damping < 1e4:
            moved = x + np.clip(_newton(errors, slopes, x, damping), -0.4, 0.4)
            moved_errors = log_errors(measurements, np.exp(moved))
            if (now := _cost(moved_errors, moved)) < best:
                x, errors, best, damping = moved, moved_errors, now, max(damping / 4, 1e-5)
                break
            damping *= 4
        if before - best < 1e-4 * before:
            break
    return np.exp(x)


def refit(errors: np.ndarray, slopes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The fit to the rows of `errors` alone, from `values` on, where errors are linear in the constants' logarithms."""
    start = np.log(values)
    x = start
    for _ in range(20):  # Huber's weights settle
        x = x + _newton(errors + slopes @ (x - start), slopes, x, 0.0)
    return np.exp(x)


def _cost(errors: np.ndarray, x: np.ndarray) -> float:
    size = np.abs(errors)
    loss = np.where(size < HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER))
    return float(loss.sum() + 0.5 * (PRIOR_WEIGHTS * (x - PRIOR_LOGS) ** 2).sum())


def _newton(errors: np.ndarray, slopes: np.ndarray, x: np.ndarray, damping: float) -> np.ndarray:
    robust = np.minimum(1.0, HUBER / np.maximum(np.abs(errors), 1e-9))
    normal = slopes.T @ (slopes * robust[:, None]) + np.diag(PRIOR_WEIGHTS)
    gradient = slopes.T @ (robust * errors) + PRIOR_WEIGHTS * (x - PRIOR_LOGS)
    return -np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)


def _slopes(measurements: Sequence[Measurement], x: np.ndarray, errors: np.ndarray) -> np.ndarray:
    return np.stack([_slope(measurements, x, errors, index) for index in range(len(x))], axis=1)


def _slope(measurements: Sequence[Measurement], x: np.ndarray, errors: np.ndarray, index: int) -> np.ndarray:
    """Change of every row's error with the logarithm of one constant; only rows that it concerns are predicted."""
    name, families, *_ = PRIORS[index]
    ahead = x.copy()
    ahead[index] += 0.02
    concerned = [
        i for i, each in enumerate(measurements) if (each.is_deepspeed if name == SOFTWARE else each.chip in families)
    ]
    slope = np.zeros(len(errors))
    slope[concerned] = (log_errors([measurements[i] for i in concerned], np.exp(ahead)) - errors[concerned]) / 0.02
    return slope


def write_constants(values: np.ndarray) -> None:
    constants, layer_ms = constants_of(values)
    head = FITTED.read_text(encoding="utf-8").split("\n[")[0].rstrip()
    lines = [head]
    for family, efficiency in constants.items():
        lines += ["", f"[{family}]"]
        lines += [f"{name} = {value:.4g}" for name, value in dataclasses.asdict(efficiency).items()]
    lines += ["", "[software]", f"{SOFTWARE} = {layer_ms:.4g}"]
    write_atomically(FITTED, "\n".join(lines) + "\n")


def time_report(measurements: Sequence[Measurement], values: np.ndarray, leave_one_out: bool) -> dict[str, Any]:
    logarithms = log_errors(measurements, values)
    errors, left_out = np.exp(logarithms) - 1, np.full(len(logarithms), np.nan)
    if leave_one_out:
        slopes = _slopes(measurements, np.log(values), logarithms)
        for family in sorted({each.family for each in measurements}):
            inside = np.array([each.family == family for each in measurements])
            values_without = refit(logarithms[~inside], slopes[~inside], values)
            held = [each for each in measurements if each.family == family]
            left_out[inside] = np.exp(log_errors(held, values_without)) - 1
    median, nearest = no_physics(measurements)
    groups: dict[str, list[int]] = {}
    for index, each in enumerate(measurements):
        groups.setdefault(each.family, []).append(index)
    for vendor in ("Ascend", "NVIDIA"):
        groups[vendor] = [index for index, each in enumerate(measurements) if each.vendor == vendor]
    table = {}
    for name, members in groups.items():
        mine = errors[members]
        table[name] = {
            "rows": len(members),
            "mape": float(np.abs(mine).mean()),
            "bias": float(mine.mean()),
            "p90": float(np.quantile(np.abs(mine), 0.9)),
            "leave_one_out_mape": float(np.abs(left_out[members]).mean()) if leave_one_out else None,
            "median_mfu_mape": float(np.abs(median[members]).mean()),
            "nearest_mfu_mape": float(np.abs(nearest[members]).mean()),
        }
    by_row = {each.id: float(error) for each, error in zip(measurements, errors, strict=True)}
    return {"groups": table, "errors": by_row}


def no_physics(measurements: Sequence[Measurement]) -> tuple[np.ndarray, np.ndarray]:
    """Errors of copying an MFU: the vendor's median, and that of the row of another family nearest in logarithms of
    hidden size, layers, sequence length, chips, tp and pp. Neither sees the family it predicts."""
    mfu = [each.mfu(each.seconds) for each in measurements]

    def features(each: Measurement) -> np.ndarray:
        job = each.row.job
        layout = job.layout
        sizes = (job.model.hidden_size, job.model.num_layers, job.sequence_length, each.row.chips, layout.tp, layout.pp)
        return np.log(np.array(sizes, dtype=float))

    at = [features(each) for each in measurements]
    median, nearest = [], []
    for i, each in enumerate(measurements):
        others = [j for j, o in enumerate(measurements) if o.vendor == each.vendor and o.family != each.family]
        closest = min(others, key=lambda j: float(np.abs(at[i] - at[j]).sum()))
        median.append(mfu[i] / statistics.median(mfu[j] for j in others) - 1)
        nearest.append(mfu[i] / mfu[closest] - 1)
    return np.array(median), np.array(nearest)


def rank_report(measurements: Sequence[Measurement], values: np.ndarray) -> dict[str, dict[str, float]]:
    """Spearman's correlation of predicted and measured throughput among at least four layouts of one model (with the
    same hidden size, layers and sequence length) on one machine."""
    constants, layer_ms = constants_of(values)
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for each in measurements:
        model, cluster = each.row.job.model, each.row.cluster
        key = (each.family, model.hidden_size, model.num_layers, each.row.job.sequence_length, cluster.chip.name)
        groups.setdefault(key, []).append(each)
    result = {}
    for (family, hidden, layers, _, _), members in groups.items():
        if len(members) >= 4:
            rates = [(m.row.job.tokens / m.row.chips / m.seconds) for m in members]
            guesses = [m.row.job.tokens / m.row.chips / m.predicted(constants, layer_ms) for m in members]
            result[f"{family} {layers} x {hidden}"] = {"layouts": len(members), "spearman": spearman(rates, guesses)}
    return result


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Places in ascending order; equal values share their mean place."""
    array = np.array(values)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])


def memory_report(
    rows: Sequence[dict[str, Any]], hardware: dict[str, Any]
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Errors of peak memory per source family and kind of figure; verdicts that are wrong."""
    errors: dict[str, list[float]] = {}
    wrong, verdicts = [], 0
    for row in rows:
        try:
            read = read_row(row, hardware)
        except (Undefined, PanguError):
            continue
        if read.no_memory:
            continue
        ranks = memory(read.job, read.cluster)
        for kind, predicted, measured in _memory_pairs(row, read, ranks):
            errors.setdefault(f"{row.get('family')}: {kind}", []).append(predicted / measured - 1)
        measured_row = row.get("measured") or {}
        ran = measured_row.get("fits", any(key in measured_row for key in ("step_time_s", "tokens_per_s_per_chip")))
        if ran or "fits" in measured_row:
            verdicts += 1
            fits = max(rank.total for rank in ranks) <= read.cluster.chip.memory_bytes
            if fits != bool(ran):
                wrong.append(str(row["id"]))
    groups = sorted(errors.items())
    if groups:
        groups.append(("all figures", [error for _, each in groups for error in each]))
    table = {
        name: {"figures": len(each), "mape": float(np.abs(each).mean()), "bias": float(np.mean(each))}
        for name, each in groups
    }
    return table, {"verdicts": verdicts, "wrong": wrong}


def _memory_pairs(row: dict[str, Any], read: Row, ranks: Sequence[Any]) -> Iterator[tuple[str, float, float]]:
    """Kind of figure, predicted, measured; ranks of one pipeline stage count once."""
    measured, layout = row.get("measured") or {}, read.job.layout
    per_rank = measured.get("memory_per_rank_mib") or {}
    entries = per_rank.items() if isinstance(per_rank, dict) else ((each["rank"], each) for each in per_rank)
    stages = {layout.coordinates(int(rank))["pp"]: value for rank, value in entries}
    for pp_rank, value in stages.items():
        rank = ranks[pp_rank]
        if isinstance(value, dict):
            yield "between steps, per rank", rank.static, value["allocated"] * 2**20
            yield "peak of the first step, per rank", rank.first_step, value["max_allocated"] * 2**20
        else:
            yield "peak, per rank", rank.allocated, value * 2**20
    kinds = {
        "memory_gib": ("reserved", max(rank.reserved for rank in ranks), 2**30),
        "memory_gb_max": ("peak", max(rank.allocated for rank in ranks), 1e9),
        "memory_gb_max_first_last_node": ("total", max(ranks[0].total, ranks[-1].total), 2**30),
        "memory_allocated_bytes": ("between steps", max(rank.static for rank in ranks), 1),
        "memory_max_allocated_bytes": ("peak", max(rank.allocated for rank in ranks), 1),
    }
    for key, (kind, predicted, unit) in kinds.items():
        if measured.get(key):
            yield kind, predicted, measured[key] * unit


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['date']}: {report['rows']} rows, {report['fitted_constants']} fitted constants\n")
    titles = ("step time", "rows", "MAPE", "bias", "p90", "left out", "median MFU", "nearest MFU")
    print("{:26s}{:>5s}{:>8s}{:>8s}{:>8s}{:>10s}{:>12s}{:>13s}".format(*titles))
    for name, g in report["step_time"]["groups"].items():
        left_out = "-" if g["leave_one_out_mape"] is None else f"{g['leave_one_out_mape']:.1%}"
        print(
            f"{name:26s}{g['rows']:5d}{g['mape']:8.1%}{g['bias']:+8.1%}{g['p90']:8.1%}{left_out:>10s}"
            f"{g['median_mfu_mape']:12.1%}{g['nearest_mfu_mape']:13.1%}"
        )
    print("\nranking layouts of one model on one machine")
    for name, group in report["rank_correlation"].items():
        print(f"{name:40s}{group['layouts']:3d} layouts  Spearman {group['spearman']:.2f}")
    print("\nmemory")
    for name, group in report["memory"].items():
        print(f"{name:46s}{group['figures']:4d}  MAPE {group['mape']:6.2%}  bias {group['bias']:+7.2%}")
    fits = report["fits"]
    print(f"fits or not: {fits['verdicts']} verdicts, {len(fits['wrong'])} wrong {' '.join(fits['wrong'])}")


if __name__ == "__main__":
    main()
