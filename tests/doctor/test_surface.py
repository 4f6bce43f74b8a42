"""What the doctor says of machines with and without NPUs, made of files and recorded output."""

from collections.abc import Callable

import pytest
import recorded
from doctor_node import Node

TORCH = {"torch": "2.13.0+cpu", "torch_npu": "2.13.0"}


def test_a_laptop_passes(node: Node, versions: Callable[..., None]) -> None:
    versions(torch="2.13.0")
    found = node.findings()
    assert {finding.status for finding in found.values()} <= {"pass", "warn", "info"}
    assert found["NPUs"].found == "none: there is no /dev/davinci0"
    assert found["torch_npu"].status == found["CANN"].status == "info"
    assert found["memory"].found == "62.5 GiB, 57.2 available"


def test_a_healthy_node(node: Node, versions: Callable[..., None]) -> None:
    versions(**TORCH)
    node.npus(2, recorded.INFO_A2)
    node.environ["ASCEND_HOME_PATH"] = str(node.cann())
    node.program("hccn_tool", i_0_link_g=recorded.LINK_UP, i_1_link_g=recorded.LINK_UP)
    found = node.findings()
    good = ("device files", "driver", "NPUs", "device memory", "links", "network ports", "CANN")
    assert {name: found[name].status for name in good} == dict.fromkeys(good, "pass")
    assert found["driver"].found == "24.1.rc2.2, firmware 7.3.0.1.231"
    assert found["NPUs"].found == "2 x 910B2C"
    assert found["device memory"].found == "64 GiB each, at least 43.8 free"
    assert found["links"].found == "HCCS between all pairs"
    assert found["CANN"].found.startswith("8.5.0 in ")
    assert "124528 (python3.8) on NPU 0" in found["processes"].found
    assert found["processes"].status == "warn"


def test_torch_npu_that_does_not_load_says_why(node: Node, versions: Callable[..., None]) -> None:
    """Here there is no CANN, and in most environments no torch_npu either."""
    versions(**TORCH)
    node.npus(2, recorded.INFO_A2)
    finding = node.findings()["torch_npu"]
    assert finding.status == "fail"
    assert finding.found.startswith("2.13.0 does not load: ")
    assert "Error" in finding.found


def test_a_node_without_its_software(node: Node, versions: Callable[..., None]) -> None:
    versions(torch="2.13.0")
    node.npus(2, recorded.INFO_A2)
    found = node.findings()
    assert (found["torch_npu"].status, found["torch_npu"].fix) == ("fail", "pip install 'pangu[npu]'")
    assert (found["CANN"].status, found["CANN"].found) == ("fail", "not installed")


def test_versions_that_do_not_fit(node: Node, versions: Callable[..., None]) -> None:
    versions(torch="2.12.1", torch_npu="2.13.0")
    found = node.findings()
    assert (found["torch"].status, found["torch"].found) == ("warn", "2.12.1")
    assert found["torch_npu"].status == "fail"
    assert found["torch_npu"].fix == "pip install 'torch-npu==2.12.*'"


def test_torch_npu_on_a_laptop_wants_no_autoload(node: Node, versions: Callable[..., None]) -> None:
    versions(**TORCH)
    assert node.findings()["torch_npu"].status == "warn"
    node.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    assert node.findings()["torch_npu"].status == "pass"


def test_cann_that_is_not_in_use(node: Node) -> None:
    folder = node.cann()
    node.npus(2, recorded.INFO_A2)
    finding = node.findings()["CANN"]
    assert (finding.status, finding.fix) == ("fail", f"source {folder.parent / 'set_env.sh'}")


def test_an_ill_device_fails(node: Node) -> None:
    node.npus(2, recorded.INFO_A2_ILL)
    finding = node.findings()["NPUs"]
    assert finding.status == "fail"
    assert "NPU 1 (0000:19:00.0) Alarm" in finding.found


def test_a_container_without_permissions(node: Node) -> None:
    node.npus(2, recorded.NO_ACCESS)
    (node.root / "dev/devmm_svm").unlink()
    found = node.findings()
    assert found["driver"].status == "fail"
    assert "ret is -8020" in found["driver"].found
    assert found["device files"].status == "fail"
    assert str(node.root / "dev/devmm_svm") in found["device files"].found


def test_an_old_driver_warns(node: Node) -> None:
    node.npus(2, recorded.INFO_A2, board=recorded.BOARD.replace("24.1.rc2.2", "22.0.4"))
    finding = node.findings()["driver"]
    assert finding.status == "warn"
    assert "expandable_segments:False" in finding.fix


def test_firmware_of_another_release_fails(node: Node) -> None:
    node.npus(2, recorded.INFO_A2, board=recorded.BOARD.replace(": OK", ": NOT OK"))
    assert node.findings()["driver"].status == "fail"


def test_links_over_the_host_warn(node: Node) -> None:
    node.npus(2, recorded.INFO_A2, topology=recorded.TOPOLOGY_PCIE)
    finding = node.findings()["links"]
    assert finding.status == "warn"
    assert finding.found == "PHB; 1 pairs without HCCS, such as NPU0-NPU1"


def test_a_network_port_that_is_down_warns(node: Node) -> None:
    node.npus(2, recorded.INFO_A2)
    node.program("hccn_tool", i_0_link_g=recorded.LINK_UP, i_1_link_g=recorded.LINK_DOWN)
    finding = node.findings()["network ports"]
    assert (finding.status, finding.found) == ("warn", "link down on NPU 1")


def test_gpus_are_listed(node: Node) -> None:
    (node.programs / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB'\n")
    (node.programs / "nvidia-smi").chmod(0o700)
    assert node.findings()["GPU"].found == "NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB"


# ---- variables


def test_what_pangu_would_set_passes(node: Node) -> None:
    node.npus(2, recorded.INFO_A2)
    finding = node.findings()["TASK_QUEUE_ENABLE"]
    assert (finding.status, finding.found) == ("pass", "not set; Pangu sets 2")


def test_another_value_than_recommended_warns_with_the_reason(node: Node) -> None:
    node.npus(2, recorded.INFO_A2)
    node.environ |= {"TASK_QUEUE_ENABLE": "0", "HCCL_EXEC_TIMEOUT": "3600"}
    found = node.findings()
    assert (found["TASK_QUEUE_ENABLE"].status, found["TASK_QUEUE_ENABLE"].found) == ("warn", "0")
    assert "recommended: 2 (operators are launched by a second thread" in found["TASK_QUEUE_ENABLE"].fix
    assert found["HCCL_EVENT_TIMEOUT"].found == "not set; Pangu sets 3632"


def test_what_cannot_work_fails(node: Node) -> None:
    node.environ["HCCL_CONNECT_TIMEOUT"] = "1"
    assert node.findings()["NPU"].status == "info", "nothing fails for a variable that nothing reads"
    found = node.findings("--train.device", "npu")
    assert any("give whole seconds" in finding.found and finding.status == "fail" for finding in found.values())


@pytest.mark.parametrize("chosen", ["lo", "=lo", "^lo"])
def test_interfaces_that_exist(node: Node, chosen: str) -> None:
    node.npus(2, recorded.INFO_A2)
    node.environ["HCCL_SOCKET_IFNAME"] = chosen
    assert node.findings()["HCCL_SOCKET_IFNAME"].status == "pass"


def test_files_and_interfaces_that_do_not_exist(node: Node) -> None:
    node.npus(2, recorded.INFO_A2)
    table = node.root / "hccl.json"
    table.touch()
    link = node.root / "link.json"
    link.symlink_to(table)
    node.environ |= {"HCCL_SOCKET_IFNAME": "=l", "RANK_TABLE_FILE": str(link)}
    found = node.findings()
    assert found["HCCL_SOCKET_IFNAME"].status == "fail"
    assert found["RANK_TABLE_FILE"].status == "fail"
    node.environ["RANK_TABLE_FILE"] = str(table)
    assert node.findings()["RANK_TABLE_FILE"].status == "pass"
