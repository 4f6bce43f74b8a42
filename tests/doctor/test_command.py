"""The command: exit codes, report, cluster file, and what is measured by processes of its own."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from doctor_node import Node

from pangu import config as configuration
from pangu.cli import main
from pangu.doctor import cluster_file, deep, surface
from pangu.doctor.deep import Measurements
from pangu.errors import ConfigError
from pangu.plan.hardware import load_cluster


def test_the_exit_code_says_whether_something_fails(
    node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = surface.Machine(node.root, node.environ)
    monkeypatch.setattr(surface, "Machine", lambda: machine)
    assert main(["doctor"]) == 0
    assert "there is no /dev/davinci0" in capsys.readouterr().out
    node.npus(1, "")
    assert main(["doctor", "--json", str(tmp_path / "report.json")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert any(finding["status"] == "fail" and finding["name"] == "driver" for finding in report["findings"])
    assert report["measurements"] is None


def test_the_report_holds_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "600")
    monkeypatch.setenv("SOME_TOKEN", "not to be sent")
    main(["doctor", "debug", "--data.tokenizer", "/not/to/be/sent", "--json", str(tmp_path / "report.json")])
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text)["environment"]["HCCL_CONNECT_TIMEOUT"] == "600"
    assert "to be sent" not in text
    assert "/to/be/sent" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--emulate"], "--emulate, --nproc and --cluster-file are for --deep"),
        (["--deep", "--device", "cpu", "--emulate"], "--emulate is for --device npu, not for 'cpu'"),
        (["--deep", "--nproc", "0"], "--nproc 0 must be at least 1"),
        (["--json", "/nowhere/report.json"], "the folder /nowhere is not there"),
        (["--deep", "--device", "npu", "--emulate", "--cluster-file", "x.toml"], "an emulated device has no rates"),
        (["nosuch"], "no config file 'nosuch'"),
        (["debug", "--wrong.field", "1"], "unknown field wrong"),
    ],
)
def test_bad_options_are_refused_at_once(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.out == ""


@pytest.mark.slow
def test_deep_on_this_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, cluster = tmp_path / "report.json", tmp_path / "this_machine.toml"
    files = ["--json", str(report), "--cluster-file", str(cluster)]
    arguments = ["doctor", "debug", "--deep", "--device", "cpu", "--nproc", "4", "--parallel.tp", "2", *files]
    assert main(arguments) == 0, capsys.readouterr().out
    measured = json.loads(report.read_text())["measurements"]["records"]
    assert {row["operator"] for row in measured["operator"]} >= {"rms_norm", "attention", "weight_gradient", "adamw"}
    assert all(row["error"] <= row["tolerance"] for row in measured["operator"])
    assert measured["training"][0]["losses"] == measured["training"][0]["cpu_losses"]
    assert len(measured["training"][0]["losses"]) == 20
    assert all(row["correct"] and row["bytes_per_second"] > 0 for row in measured["exchange"])
    groups = {(row["dimension"], row["size"], row["stride"]) for row in measured["exchange"]}
    assert groups == {("tp", 2, 1), ("dp_shard", 2, 2), ("node", 2, 1), ("node", 4, 1)}
    assert {row["operator"] for row in measured["overlap"]} == {
        "all_gather_matmul chunked",
        "matmul_reduce_scatter chunked",
    }
    loaded = load_cluster(cluster)
    best = max(row["flops_per_second"] for row in measured["matmul"] if row["dtype"] == "fp32")
    assert loaded.chip.peak_flops("fp32") == pytest.approx(best, rel=1e-3)
    assert loaded.node.devices == 4


@pytest.mark.ascend
def test_deep_on_an_emulated_npu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    arguments = ["--deep", "--device", "npu", "--emulate", "--nproc", "2", "--json", str(report)]
    assert main(["doctor", "debug", *arguments]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "TFLOP/s" not in printed, "an emulated device has no rates"
    measured = json.loads(report.read_text())["measurements"]
    assert measured["emulated"]
    assert {row["operator"] for row in measured["records"]["overlap"]} == {
        f"{operator} {mode}"
        for operator in ("all_gather_matmul", "matmul_reduce_scatter")
        for mode in ("chunked", "fused")
    }
    assert measured["records"]["training"][0]["difference"] < 1e-4


def test_a_device_that_is_not_there_is_a_finding(tmp_path: Path) -> None:
    """What its process has said is in the report, and so is what others have measured."""
    config = configuration.load("debug", ["--train.device", "cuda"])
    measured = deep.measure(config, "cuda", emulate=False, world_size=1, say=lambda text: None)
    (finding,) = [finding for finding in deep.judge(config, measured) if finding.status == "fail"]
    assert "cuda" in finding.found


def test_a_process_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "python"
    worker.write_text("#!/bin/sh\necho 'aclrtMalloc failed'\nkill -SEGV $$\n")
    worker.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(worker))
    measured = deep.measure(configuration.load("debug"), "cpu", emulate=False, world_size=2, say=lambda text: None)
    assert measured.failures[0] == "alone, rank 0, SIGSEGV: aclrtMalloc failed"
    assert measured.failures[1].startswith("together, rank ")


# ---- judging, and the cluster file, of measurements that no machine here could make


OPERATOR = {"operator": "rope", "dtype": "fp32", "error": 1e-6, "tolerance": 1e-3, "message": ""}
TRAINING = {"losses": [6.0, 5.0], "cpu_losses": [6.0, 5.0], "difference": 0.0, "tolerance": 2e-2}
EXCHANGE = {"dimension": "tp", "size": 8, "stride": 1, "collective": "all_gather", "correct": True}
EXCHANGE |= {"bytes_per_second": 1.0, "latency_seconds": 1.0}


def measurements(device: str = "npu", name: str = "Ascend910B2", **changes: Any) -> Measurements:
    exchange = EXCHANGE | {"dimension": "node", "latency_seconds": 12e-6}
    records = {
        "device": [{"name": name, "memory_bytes": 61 << 30, "threads": 1}],
        "operator": [OPERATOR],
        "matmul": [
            {"name": "square", "dtype": dtype, "m": 1, "n": 1, "k": 1, "flops_per_second": rate}
            for dtype, rate in (("fp32", 70e12), ("bf16", 200e12), ("bf16", 283.11552e12))
        ],
        "memory": [{"copy": 1.2e12, "host_to_device": 2e10, "device_to_host": 2e10, "vector_flops_per_second": 1e13}],
        "training": [TRAINING],
        "exchange": [exchange | {"size": size, "bytes_per_second": (size - 1) * 21e9} for size in (2, 8)],
    }
    return Measurements(device, False, 8, records | changes)


def load(measured: Measurements, tmp_path: Path) -> Any:
    cluster_file.write(tmp_path / "this_machine.toml", measured)
    return load_cluster(tmp_path / "this_machine.toml")


def test_a_known_chip_keeps_its_peak_and_gets_an_efficiency(tmp_path: Path) -> None:
    cluster = load(measurements(), tmp_path)
    assert cluster.chip.peak_flops("bf16") == pytest.approx(353.8944e12, rel=1e-3)
    assert cluster.efficiency.matmul == pytest.approx(0.8)
    assert cluster.chip.memory_bandwidth == 1.2e12
    assert cluster.efficiency.memory == cluster.efficiency.intra_node == 1
    assert cluster.node.topology == "full_mesh"
    assert cluster.node.group_bandwidth(8) == pytest.approx(7 * 21e9)
    assert cluster.node.group_bandwidth(2) == pytest.approx(21e9)
    assert cluster.node.latency_us == 12


def test_a_switched_node(tmp_path: Path) -> None:
    cluster = load(measurements("cuda", "NVIDIA H100 80GB HBM3"), tmp_path)
    assert (cluster.chip.family, cluster.node.topology) == ("h100", "switch")
    assert cluster.node.group_bandwidth(2) == pytest.approx(7 * 21e9)


def test_a_single_device_has_no_link(tmp_path: Path) -> None:
    cluster = load(measurements(exchange=[]), tmp_path)
    assert cluster.node.link_gb_per_s > 0


def test_without_rates_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rates for --cluster-file: alone, rank 0"):
        cluster_file.write(tmp_path / "x.toml", Measurements("npu", False, 8, {}, ["alone, rank 0, SIGSEGV: x"]))
    with pytest.raises(ConfigError, match="the planner knows no chip like 'Radeon'"):
        cluster_file.write(tmp_path / "x.toml", measurements("cuda", "Radeon"))
    assert not (tmp_path / "x.toml").exists()


@pytest.mark.parametrize(
    ("part", "row", "name"),
    [
        ("operator", OPERATOR | {"error": 1.0}, "rope"),
        ("operator", OPERATOR | {"error": float("nan"), "message": "RuntimeError: aclnn"}, "rope"),
        ("overlap", {"operator": "all_gather_matmul fused", "difference": 0.5}, "all_gather_matmul fused"),
        ("training", TRAINING | {"difference": 0.25}, "small model"),
        ("training", TRAINING | {"losses": [6.0, 6.0]}, "small model"),
        ("exchange", EXCHANGE | {"correct": False}, "tp 8 all_gather"),
    ],
)
def test_wrong_results_fail(part: str, row: dict[str, Any], name: str) -> None:
    config = configuration.load("debug")
    findings = deep.judge(config, measurements(**{part: [row]}))
    assert [finding.name for finding in findings if finding.status == "fail"] == [name]
    assert not [finding for finding in deep.judge(config, measurements()) if finding.status == "fail"]
