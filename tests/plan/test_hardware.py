"""Cluster files: every one in the repository loads, links and rates follow the topology, bad values are refused."""

import dataclasses
from pathlib import Path

import pytest

from pangu.errors import ConfigError
from pangu.plan.hardware import CLUSTERS, load_cluster

NAMES = sorted(path.stem for path in CLUSTERS.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_cluster_in_the_repository_loads_and_names_its_sources(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.chip.memory_bytes > 10e9
    lines = (CLUSTERS / f"{name}.toml").read_text().splitlines()
    rates = [line for line in lines if "gb_per_s" in line or "latency" in line or "memory_gib" in line]
    assert len(rates) >= 4
    assert all("#" in line for line in rates)


def test_a_group_in_a_full_mesh_has_one_link_less_than_members() -> None:
    node = load_cluster("atlas_900_a2").node
    assert [node.group_bandwidth(size) for size in (2, 4, 8)] == [28e9, 84e9, 196e9]


def test_any_group_behind_a_switch_has_a_devices_whole_bandwidth() -> None:
    node = load_cluster("dgx_h100").node
    assert node.group_bandwidth(2) == node.group_bandwidth(8) == 450e9


def test_a_group_across_nodes_shares_the_ports_of_its_members() -> None:
    cluster = load_cluster("dgx_a100")
    assert cluster.bandwidth(16, 1) == 25e9
    assert cluster.bandwidth(16, 8) == 200e9
    assert cluster.bandwidth(8, 8) == 300e9


def test_one_node_has_no_network() -> None:
    alone = dataclasses.replace(load_cluster("dgx_b200"), network=None)
    assert alone.bandwidth(8, 8) == 900e9
    with pytest.raises(ConfigError, match="no \\[network\\]"):
        alone.bandwidth(16, 8)


def test_a_precision_the_chip_does_not_have_is_refused() -> None:
    assert load_cluster("dgx_h100").chip.peak_flops("fp8") == 1979e12
    with pytest.raises(ConfigError, match=r"no fp8 rate; add chip\.peak_tflops\.fp8"):
        load_cluster("dgx_a100").chip.peak_flops("fp8")
    with pytest.raises(ConfigError, match="no bf16 rate"):
        load_cluster("dgx2_v100").chip.peak_flops("bf16")


def test_a_lower_power_limit_lowers_the_clock_by_its_cube_root() -> None:
    chip = dataclasses.replace(load_cluster("dgx_h100").chip, power_w=500)
    assert chip.power_factor == pytest.approx((5 / 7) ** (1 / 3))
    assert dataclasses.replace(chip, power_w=900).power_factor == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rails = 8", "rials = 8", r"unknown field network\.rials \(did you mean 'rails'\?\)"),
        ("cores = 108", "cores = 0", r"chip\.cores = 0: Input should be greater than 0"),
        ("devices = 8", "devices = -8", r"node\.devices = -8"),
        ('topology = "switch"', 'topology = "ring"', r"node\.topology = 'ring': .*'full_mesh' or 'switch'"),
        ('family = "a100"', 'family = "a200"', r"chip\.family = 'a200'"),
        ("memory_gib = 79.15", 'memory_gib = "much"', r"chip\.memory_gib = 'much'"),
        ("link_gb_per_s = 300", "", r"node\.link_gb_per_s is missing"),
        ("latency_us = 15", "latency_us = -1", r"network\.latency_us = -1"),
        ("[node]", "[node", "Expected"),
    ],
)
def test_a_bad_file_is_refused_with_the_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (CLUSTERS / "dgx_a100.toml").read_text()
    assert old in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_cluster(path)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'dgx_a100'\?"):
        load_cluster("dgx_a10")


def test_a_file_may_hold_efficiencies_of_its_own(tmp_path: Path) -> None:
    text = (CLUSTERS / "dgx_a100.toml").read_text()
    fields = dataclasses.asdict(load_cluster("dgx_a100").efficiency) | {"matmul": 0.5}
    path = tmp_path / "mine.toml"
    path.write_text(text + "\n[efficiency]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items()))
    assert load_cluster(path).efficiency.matmul == 0.5
    path.write_text(path.read_text().replace("matmul = 0.5", "matmul = 1.5"))
    with pytest.raises(ConfigError, match=r"efficiency\.matmul = 1\.5"):
        load_cluster(path)
