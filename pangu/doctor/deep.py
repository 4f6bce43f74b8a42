"""`pangu doctor --deep`: starts the processes that measure, and judges what they have found."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pangu import config as configuration
from pangu.config import Config
from pangu.doctor.findings import Finding
from pangu.doctor.worker import Task

_PARTS = ("device", "operator", "matmul", "memory", "training")
_OVERLAP_TOLERANCE = 2.5e-2


@dataclass(frozen=True)
class Measurements:
    """records: what the processes wrote, by part, ranks merged. failures: what kept them from writing more."""

    device: str
    emulated: bool
    world_size: int
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def of(self, part: str) -> list[dict[str, Any]]:
        return self.records.get(part, [])


def measure(
    config: Config,
    device: str,
    *,
    emulate: bool,
    world_size: int,
    say: Callable[[str], None],
    timeout: float = 1800.0,
) -> Measurements:
    """Run all parts on "cpu", "cuda" or "npu"; with `world_size` 1 nothing is exchanged. `say` is told what goes on."""
    result = Measurements(device, emulate, world_size)
    say(f"operators, rates and {device} against CPU training, in one process")
    _run("alone", config, result, 1, timeout)
    if world_size > 1:
        say(f"collectives, in {world_size} processes")
        _run("together", config, result, world_size, timeout)
        result.records["exchange"] = _slowest(result.of("exchange"))
        result.records["overlap"] = _largest(result.of("overlap"))
    return result


def judge(config: Config, result: Measurements) -> Iterator[Finding]:
    """Findings about measurements: wrong results fail, rates are for information, and none of an emulated device."""
    for message in result.failures:
        yield Finding("processes", "failed", "fail", message, "the report has what was measured before")
    yield from _judge_operators(result)
    yield from _judge_training(result)
    if not result.emulated:
        yield from _rates(result)
    yield from _judge_exchanges(config, result)


def _rates(result: Measurements) -> Iterator[Finding]:
    for dtype in ("fp32", "bf16"):
        best = max((row["flops_per_second"] for row in result.of("matmul") if row["dtype"] == dtype), default=None)
        if best is not None:
            yield Finding("rates", f"matmul {dtype}", "info", f"{best / 1e12:.3f} TFLOP/s at best")
    for row in result.of("memory"):
        yield Finding("rates", "copy", "info", f"{row['copy'] / 1e9:.1f} GB/s read and written")
        if not math.isnan(row["host_to_device"]):
            found = f"{row['host_to_device'] / 1e9:.1f} and {row['device_to_host'] / 1e9:.1f} GB/s"
            yield Finding("rates", "host to device and back", "info", found)


def _judge_operators(result: Measurements) -> Iterator[Finding]:
    rows = result.of("operator")
    for operator in dict.fromkeys(row["operator"] for row in rows):
        own = [row for row in rows if row["operator"] == operator]
        wrong = [row for row in own if row["message"] or not row["error"] <= row["tolerance"]]
        errors = ", ".join(f"{row['dtype']} {row['error']:.0e}" for row in own)
        if wrong:
            detail = "; ".join(row["message"] or f"{row['dtype']} allows {row['tolerance']:.0e}" for row in wrong)
            fix = "do not train on this device: its results are wrong; compare versions of CANN, driver and torch_npu"
            yield Finding("operators", operator, "fail", f"largest error {errors}; {detail}", fix)
        else:
            yield Finding("operators", operator, "pass", f"largest error {errors}")
    for row in result.of("overlap"):
        good = row["difference"] <= _OVERLAP_TOLERANCE
        fix = "" if good else "set parallel.overlap to 'reference'"
        found = f"{row['difference']:.0e} from the unoverlapped"
        yield Finding("operators", row["operator"], "pass" if good else "fail", found, fix)


def _judge_training(result: Measurements) -> Iterator[Finding]:
    for row in result.of("training"):
        losses, difference = row["losses"], row["difference"]
        good = difference <= row["tolerance"] and losses[-1] < losses[0]
        found = f"{len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}, within {difference:.0e} of the CPU's"
        fix = "" if good else f"allowed are {row['tolerance']:.0e}; see which operator fails above"
        yield Finding("training", "small model", "pass" if good else "fail", found, fix)


def _judge_exchanges(config: Config, result: Measurements) -> Iterator[Finding]:
    from pangu.doctor.collectives import shapes

    for row in result.of("exchange"):
        name = f"{row['dimension']} {row['size']}" + (f" stride {row['stride']}" if row["stride"] > 1 else "")
        rate = f"{row['bytes_per_second'] / 1e9:.2f} GB/s, {row['latency_seconds'] * 1e6:.0f} us"
        found = "emulated" if result.emulated else rate
        fix = "" if row["correct"] else "wrong data arrived: check links and HCCL's version"
        yield Finding("collectives", f"{name} {row['collective']}", "pass" if row["correct"] else "fail", found, fix)
    _, missing = shapes(config.parallel, result.world_size)
    for shape in missing:
        found = f"{shape.size} ranks {shape.stride} apart do not fit into {result.world_size}: not measured"
        yield Finding("collectives", shape.dimension, "info", found)


def _run(part: Any, config: Config, result: Measurements, world_size: int, timeout: float) -> None:
    of_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in of_torchrun}
    environment |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONUNBUFFERED": "1"}
    tree = configuration.to_tree(config)
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world_size):
            output, log = Path(folder, f"{rank}.jsonl"), Path(folder, f"{rank}.log")
            store = str(Path(folder, "store"))
            task = Task(part, tree, result.device, result.emulated, rank, world_size, store, str(output))
            command = [sys.executable, "-m", "pangu.doctor.worker", json.dumps(dataclasses.asdict(task))]
            with log.open("wb") as file:
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        failed = _first_failure(processes, timeout)
        for rank in range(world_size):
            for record in _lines(Path(folder, f"{rank}.jsonl")):
                result.records.setdefault(record.pop("part"), []).append(record)
        if failed is not None:
            messages = [record["message"] for record in result.records.pop("error", [])]
            printed = Path(folder, f"{failed}.log").read_text(errors="replace")
            why = _why(part, failed, processes[failed].returncode, printed)
            result.failures.append(messages[0] if messages else why)


def _first_failure(processes: list[subprocess.Popen[bytes]], timeout: float) -> int | None:
    """The first process that has failed, when all have ended; the others are not left waiting for it for long."""
    end, failed = time.monotonic() + timeout, None
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            failing = [rank for rank, process in enumerate(processes) if process.poll()]
            if failing and failed is None:
                failed, end = failing[0], time.monotonic() + 10
            time.sleep(0.1)
    finally:
        late = [rank for rank, process in enumerate(processes) if process.poll() is None]
        for rank in late:
            processes[rank].kill()
            processes[rank].wait()
    return (
        next((rank for rank, process in enumerate(processes) if process.returncode), None) if failed is None else failed
    )


def _why(part: str, rank: int, code: int, printed: str) -> str:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{part}, rank {rank}, {name}: {' | '.join(printed.strip().splitlines()[-3:])}"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _slowest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per shape and collective: a group is as fast as its slowest rank."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = row["dimension"], row["size"], row["stride"], row["collective"]
        old = merged.setdefault(key, dict(row))
        old["bytes_per_second"] = min(old["bytes_per_second"], row["bytes_per_second"])
        old["latency_seconds"] = max(old["latency_seconds"], row["latency_seconds"])
        old["correct"] = old["correct"] and row["correct"]
    return list(merged.values())


def _largest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    largest: dict[str, float] = {}
    for row in rows:
        largest[row["operator"]] = max(largest.get(row["operator"], 0.0), row["difference"])
    return [{"operator": operator, "difference": difference} for operator, difference in largest.items()]
