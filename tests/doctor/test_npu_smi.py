"""npu-smi's output as data, from recorded samples."""

import pytest
import recorded

from pangu.doctor.npu_smi import Chip, Process, parse_board, parse_info, parse_topology, run


def test_atlas_a2() -> None:
    info = parse_info(recorded.INFO_A2)
    assert info.driver == "24.1.rc2.2"
    assert info.chips == (
        Chip(0, "910B2C", "OK", 40, "0000:5A:00.0", 20701, 65536),
        Chip(1, "910B2C", "OK", 43, "0000:19:00.0", 3366, 65536),
    )
    assert info.processes == (Process(0, 0, 124528, "python3.8", 17400),)


def test_atlas_a3_has_two_chips_per_card() -> None:
    info = parse_info(recorded.INFO_A3)
    assert info.driver == "24.1.rc3.7"
    assert [(chip.card, chip.name, chip.bus, chip.memory_used_mb) for chip in info.chips] == [
        (0, "Ascend910", "0000:9D:00.0", 3397),
        (0, "Ascend910", "0000:9F:00.0", 3186),
    ]
    assert info.processes == ()


def test_ascend_950_has_more_columns() -> None:
    info = parse_info(recorded.INFO_950)
    assert info.chips == (Chip(0, "Ascend950PR", "OK", 56, "0000:61:00.0", 5239, 131072),)


def test_an_ill_device() -> None:
    assert [chip.health for chip in parse_info(recorded.INFO_A2_ILL).chips] == ["OK", "Alarm"]


@pytest.mark.parametrize("text", ["", recorded.NO_ACCESS, "| 0 | 910B |\n| x |", recorded.INFO_A2[:700]])
def test_what_is_no_table_or_cut_off_has_no_chips(text: str) -> None:
    assert parse_info(text).chips == ()


def test_board() -> None:
    board = parse_board(recorded.BOARD)
    assert board["Software Version"] == "24.1.rc2.2"
    assert board["Firmware Version"] == "7.3.0.1.231"
    assert board["PCIe Bus Info"] == "0000:5A:00.0"
    assert parse_board(recorded.NO_ACCESS) == {}


def test_topology_of_a_full_mesh() -> None:
    links = parse_topology(recorded.TOPOLOGY_A2)
    assert len(links) == 4 * 3
    assert set(links.values()) == {"HCCS"}
    assert links["NPU3", "NPU0"] == "HCCS"


def test_topology_of_dies_and_packages() -> None:
    links = parse_topology(recorded.TOPOLOGY_A3)
    assert links["Phy-ID0", "Phy-ID1"] == "SIO"
    assert links["Phy-ID0", "Phy-ID3"] == "HCCS_SW"
    assert len(links) == 4 * 3


def test_topology_over_the_host() -> None:
    assert parse_topology(recorded.TOPOLOGY_PCIE) == {("NPU0", "NPU1"): "PHB", ("NPU1", "NPU0"): "PHB"}
    assert parse_topology(recorded.NO_ACCESS) == {}


def test_without_npu_smi_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    works, text = run("info")
    assert not works
    assert "npu-smi is not there" in text
