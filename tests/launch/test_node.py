"""Launched workers on one machine: what is said of those that fail, how they are stopped and started again."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from launch_helpers import Running, free_port, runs, wait_until

HERE = Path(__file__).parent
HOST = socket.gethostname()


def launch(folder: Path, *behaviour: str, **fields: object) -> Running:
    job = {"command": [str(folder), *behaviour], "nproc": 2, **fields}
    return Running([sys.executable, str(HERE / "launch_payload.py"), json.dumps(job)])


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("rank_*.pid")]


def environment(folder: Path, rank: int, attempt: int = 0) -> dict[str, str]:
    result: dict[str, str] = json.loads((folder / f"rank_{rank}.{attempt}").read_text())
    return result


def test_a_failure_names_rank_and_coordinates_and_ends_the_others(tmp_path: Path) -> None:
    with launch(tmp_path, "die", "1", nproc=3) as launcher:
        assert launcher.wait() == 1
        assert f"pangu: rank 1 (tp 1) on node 0 ({HOST}) was killed by SIGKILL" in launcher.said
        assert len(pids(tmp_path)) == 3
        assert not any(map(runs, pids(tmp_path)))


def test_the_worker_that_failed_is_named_not_one_that_was_killed_for_it(tmp_path: Path) -> None:
    with launch(tmp_path, "raise", "1", nproc=3) as launcher:
        assert launcher.wait() == 1
        assert f"pangu: rank 1 (tp 1) on node 0 ({HOST}) ended with exit code 1" in launcher.said
        assert not any(map(runs, pids(tmp_path)))


def test_sigterm_lets_workers_save_once(tmp_path: Path) -> None:
    with launch(tmp_path, "stop", max_restarts=3) as launcher:
        launcher.wait_for("waits", count=2)
        launcher.signal(signal.SIGTERM)
        assert launcher.wait() == 130
        assert environment(tmp_path, 0)["LOCAL_RANK"] == "0"
        assert environment(tmp_path, 1)["WORLD_SIZE"] == "2"
        assert "SIGTERM: the workers end after a checkpoint" in launcher.said


def test_workers_that_do_not_stop_are_killed_and_named(tmp_path: Path) -> None:
    with launch(tmp_path, "wait", stop_seconds=1) as launcher:
        launcher.wait_for("waits", count=2)
        for pid in pids(tmp_path):
            os.kill(pid, signal.SIGSTOP)
        launcher.signal(signal.SIGINT)
        assert launcher.wait() == 1
        assert "was killed by SIGKILL, 1 s after it was asked to stop" in launcher.said
        assert not any(map(runs, pids(tmp_path)))


def test_workers_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    with launch(tmp_path, "wait") as launcher:
        launcher.wait_for("waits", count=2)
        launcher.signal(signal.SIGKILL)
        wait_until(lambda: not any(map(runs, pids(tmp_path))), "for the workers to end")


def test_refused_input_is_exit_code_2_and_not_tried_again(tmp_path: Path) -> None:
    with launch(tmp_path, "refuse", max_restarts=3) as launcher:
        assert launcher.wait() == 2
        assert "ended with exit code 2" in launcher.said
        assert not (tmp_path / "rank_0.1").exists()


def test_two_nodes_start_again_together(tmp_path: Path) -> None:
    """Rank 3 raises half a second after the others noticed: it is the cause all the same."""
    fields = {"nnodes": 2, "master_port": free_port(), "max_restarts": 1}
    with (
        launch(tmp_path, "raise once", "3", node_rank=0, **fields) as first,
        launch(tmp_path, "raise once", "3", node_rank=1, **fields) as second,
    ):
        assert [first.wait(), second.wait()] == [0, 0]
        cause = f"pangu: rank 3 (tp 3) on node 1 ({HOST}) failed: ValueError: what was asked for"
        assert cause in first.said
        assert cause in second.said
    for rank in range(4):
        seen = environment(tmp_path, rank, attempt=1)
        assert [seen[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")] == [
            str(rank),
            str(rank % 2),
            "4",
            "2",
            str(rank // 2),
        ]
        assert seen["OMP_NUM_THREADS"] == "1"
        assert seen["GLOO_SOCKET_IFNAME"] == seen["HCCL_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_node_is_named_by_the_other(tmp_path: Path, lost: int) -> None:
    fields = {"nnodes": 2, "master_port": free_port()}
    with (
        launch(tmp_path, "wait", node_rank=lost, **fields) as killed,
        launch(tmp_path, "wait", node_rank=1 - lost, **fields) as survivor,
    ):
        survivor.wait_for("waits", count=2)
        killed.signal(signal.SIGKILL)
        assert survivor.wait() == 1
        name = "127.0.0.1" if lost == 0 else HOST
        assert f"pangu: node {lost} ({name}) is lost: " in survivor.said
        assert f"it held rank {2 * lost} (tp {2 * lost}), rank {2 * lost + 1} (tp {2 * lost + 1})" in survivor.said


def test_variables_of_a_scheduler_do_not_reach_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes operators set RANK to the node's rank and LOCAL_RANK to a list."""
    for name, text in (("RANK", "7"), ("LOCAL_RANK", "0,1"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "elsewhere")):
        monkeypatch.setenv(name, text)
    with launch(tmp_path, "end") as launcher:
        assert launcher.wait() == 0
        seen = environment(tmp_path, 1)
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == ("1", "1", "2")
        assert seen["MASTER_ADDR"] == "127.0.0.1"


def test_a_rank_table_of_both_nodes_is_written_before_workers_start(tmp_path: Path) -> None:
    (tmp_path / "hccn.conf").write_text("address_0=10.20.0.1\naddress_1=10.20.0.2\n")
    table = tmp_path / "table.json"
    fields = {
        "nnodes": 2,
        "master_port": free_port(),
        "rank_table": str(table),
        "hccn_conf": str(tmp_path / "hccn.conf"),
    }
    with (
        launch(tmp_path, "end", node_rank=0, **fields) as first,
        launch(tmp_path, "end", node_rank=1, **fields) as second,
    ):
        assert [first.wait(), second.wait()] == [0, 0]
    assert environment(tmp_path, 3)["RANK_TABLE_FILE"] == str(table)
    servers = json.loads(table.read_text())["server_list"]
    assert [[device["rank_id"] for device in server["device"]] for server in servers] == [["0", "1"], ["2", "3"]]


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with launch(tmp_path, "end", nnodes=2, master_port=port) as launcher:
            assert launcher.wait() == 1
            assert f"--master-port {port}: Address already in use; choose another" in launcher.said


def test_a_node_0_that_does_not_answer_is_named(tmp_path: Path) -> None:
    port = free_port()
    with launch(tmp_path, "end", nnodes=2, node_rank=1, master_port=port, join_seconds=1) as launcher:
        assert launcher.wait() == 1
        assert f"node 0 did not answer at 127.0.0.1:{port} for 1 s" in launcher.said
