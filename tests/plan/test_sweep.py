"""Sweeps over hardware: which field, which value, and that the curves go the way physics says."""

from pathlib import Path

import pytest
from plan_helpers import cluster_with, small_config
from rich.console import Console

from pangu.errors import ConfigError
from pangu.plan.sweep import P2P_BANDWIDTH, curves_of, parse_sweep, print_sweep, sweep, with_field


def test_fields() -> None:
    cluster = cluster_with()
    assert parse_sweep("p2p_bandwidth=400,100,200", cluster) == (P2P_BANDWIDTH, [100, 200, 400])
    assert parse_sweep("device_gbit_per_s=100,200", cluster) == ("network.device_gbit_per_s", [100, 200])
    assert parse_sweep("chip.memory_gib=32,64", cluster)[0] == "chip.memory_gib"
    assert with_field(cluster, P2P_BANDWIDTH, 100).node.link_gb_per_s == 50
    assert with_field(cluster, "efficiency.matmul", 0.5).efficiency.matmul == 0.5
    assert cluster_with() == cluster, "the cluster itself is as before"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("p2p_bandwith=1,2", "did you mean 'p2p_bandwidth'"),
        ("latency_us=1,2", "node.latency_us, network.latency_us"),
        ("memory_gib=64", "at least two different positive numbers"),
        ("memory_gib=64,64", "at least two different positive numbers"),
        ("memory_gib=64,-1", "at least two different positive numbers"),
        ("memory_gib=64,many", "NUMBER"),
        ("memory_gib", "NUMBER"),
    ],
)
def test_bad_sweeps_are_named(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_sweep(text, cluster_with())
    assert named in str(error.value)


def test_impossible_values_are_named() -> None:
    with pytest.raises(ConfigError, match=r"efficiency\.matmul = 2"):
        with_field(cluster_with(), "efficiency.matmul", 2.0)


def test_tensor_parallelism_wants_bandwidth(tmp_path: Path) -> None:
    """Yuan's study in small: a layout with tensor parallelism gains from bandwidth, one without hardly does."""
    config, cluster = small_config(num_layers=4), cluster_with("dgx_a100")
    curves = curves_of(cluster, P2P_BANDWIDTH, None)
    points = sweep(config, cluster, 8, P2P_BANDWIDTH, [20, 400], curves, lambda share, text: None)
    (slow, fast) = (point.plans for point in points)
    with_tensor, without = list(curves)
    gain = {name: slow[name].time.step / fast[name].time.step for name in curves}
    assert gain[with_tensor] > 1.2
    assert gain[with_tensor] > gain[without] >= 1
    assert slow[with_tensor].shape.tp > 1 == slow[without].shape.tp
    console = Console(record=True, width=160)
    print_sweep(console, P2P_BANDWIDTH, points, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "+84.7%" in console.export_text(), "the paper's figure stands beside ours"
