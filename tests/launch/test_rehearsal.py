"""Two real nodes: network namespaces with a link between them, two processes each, training to one model's losses.

Then what happens to real nodes: one dies, or the link between them is cut.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_helpers import Running, runs, wait_until

from pangu.train.events import read_events

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NODES = ("pangu-node0", "pangu-node1")
ADDRESSES = ("10.213.0.1", "10.213.0.2")
FILES = Path("/etc/netns")  # where `ip netns exec` looks for the files that a node has instead of this machine's
LAYOUT = ("--parallel.tp", "2", "--parallel.tp_across_nodes", "false")
STEPS = 60
TRAIN = ("--train.steps", str(STEPS), "--checkpoint.interval", "5", "--metrics.tensorboard", "false", *LAYOUT)


@pytest.fixture
def nodes() -> Iterator[None]:
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2: it makes network namespaces")
    remove_nodes()
    probe = subprocess.run(["ip", "netns", "add", NODES[0]], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"network namespaces cannot be made here: {probe.stderr.strip()}")
    ip("netns", "add", NODES[1])
    ip("link", "add", "veth0", "netns", NODES[0], "type", "veth", "peer", "name", "veth1", "netns", NODES[1])
    hosts = "".join(f"{address} {node}\n" for address, node in zip(ADDRESSES, NODES, strict=True))
    for number, (node, address) in enumerate(zip(NODES, ADDRESSES, strict=True)):
        ip("-n", node, "address", "add", f"{address}/24", "dev", f"veth{number}")
        set_link(number, "up")
        ip("-n", node, "link", "set", "lo", "up")
        files = FILES / node
        files.mkdir(parents=True, exist_ok=True)
        (files / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        (files / "resolv.conf").write_text("")
    yield
    remove_nodes()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def set_link(number: int, state: str) -> None:
    ip("-n", NODES[number], "link", "set", f"veth{number}", state)


def remove_nodes() -> None:
    for node in NODES:
        for pid in processes_of(node):
            os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", node], stderr=subprocess.DEVNULL)
        shutil.rmtree(FILES / node, ignore_errors=True)


def processes_of(node: str) -> list[int]:
    """Everything that runs on a node: launcher, agent and workers."""
    answer = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True)
    return [int(word) for word in answer.stdout.split() if runs(int(word))]


def launch(node: int, run: Path, *options: object) -> Running:
    words = ("--nnodes", 2, "--nproc", 2, "--node-rank", node, "--master-addr", NODES[0], "--master-port", 29400)
    command = ["ip", "netns", "exec", NODES[node], sys.executable, "-m", "pangu", "launch"]
    command += [str(word) for word in (*words, *options, "train", "debug", "--output", run, *TRAIN)]
    return Running(command, cwd=ROOT)


def losses(run: Path) -> list[float]:
    events = [event for event in read_events(run) if event["kind"] == "step"]
    assert [event["step"] for event in events] == list(range(1, STEPS + 1))
    return [event["loss"] for event in events]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same four processes on one node, uninterrupted."""
    run = tmp_path_factory.mktemp("rehearsal") / "one_node"
    command = [sys.executable, "-m", "pangu", "launch", "--nproc", "4", "train", "debug", "--output", str(run), *TRAIN]
    with Running(command, cwd=ROOT) as launcher:
        assert launcher.wait() == 0
    return losses(run)


def test_two_nodes_reach_the_losses_of_one(nodes: None, expected: list[float], tmp_path: Path) -> None:
    with launch(0, tmp_path / "run") as first, launch(1, tmp_path / "run") as second:
        assert [first.wait(), second.wait()] == [0, 0]
        assert "dp_shard      2     0, 2                      2" in first.said, "data parallelism spans the nodes"
    assert losses(tmp_path / "run") == expected


def test_a_node_dies_and_comes_back(nodes: None, expected: list[float], tmp_path: Path) -> None:
    """Without a restart the survivor ends and says why; with one, training goes on when the node is back."""
    run = tmp_path / "run"
    with launch(0, run) as first, launch(1, run):
        first.wait_for(f" 12/{STEPS} ")
        kill_node(1)
        assert first.wait(timeout=60) == 1
        assert f"node 1 ({os.uname().nodename}) is lost: " in first.said
        assert "it held rank 2 (pp 0, dp_replicate 0, dp_shard 1, cp 0, tp 0), rank 3 (" in first.said
        assert not processes_of(NODES[0])

    again = tmp_path / "again"
    with launch(0, again, "--max-restarts", 1) as first, launch(1, again, "--max-restarts", 1):
        first.wait_for(f" 12/{STEPS} ")
        kill_node(1)
        first.wait_for("starting again from the newest checkpoint as soon as all nodes are there")
        with launch(1, again, "--max-restarts", 1) as back:
            assert [first.wait(), back.wait()] == [0, 0]
    assert losses(again) == expected


def test_node_0_dies_and_comes_back(nodes: None, expected: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--max-restarts", 1)
    with launch(0, run, *options) as first, launch(1, run, *options) as second:
        first.wait_for(f" 12/{STEPS} ")
        kill_node(0)
        second.wait_for(f"node 0 ({NODES[0]}) is lost: ")
        second.wait_for("waiting for node 0 to come back")
        with launch(0, run, *options) as back:
            assert [back.wait(), second.wait()] == [0, 0]
    assert losses(run) == expected


def test_the_link_is_cut_and_mended(nodes: None, expected: list[float], tmp_path: Path) -> None:
    """Nothing is closed and nothing arrives: both ends notice by silence. Mended, training goes on by itself."""
    run = tmp_path / "run"
    options = ("--max-restarts", 1, "--lost-seconds", 8)
    with launch(0, run, *options) as first, launch(1, run, *options) as second:
        first.wait_for(f" 12/{STEPS} ")
        set_link(0, "down")
        first.wait_for(f"node 1 ({os.uname().nodename}) is lost: no sign of life for 8 s")
        second.wait_for(f"node 0 ({NODES[0]}) is lost: no sign of life for 8 s")
        wait_until(lambda: len(processes_of(NODES[0])) == len(processes_of(NODES[1])) == 1, "for all workers to end")
        set_link(0, "up")
        assert [first.wait(), second.wait()] == [0, 0]
    assert losses(run) == expected


def test_a_cut_link_ends_the_job_when_no_restart_is_left(nodes: None, tmp_path: Path) -> None:
    options = ("--lost-seconds", 8)
    with launch(0, tmp_path / "run", *options) as first, launch(1, tmp_path / "run", *options) as second:
        first.wait_for(f" 2/{STEPS} ")
        set_link(1, "down")
        assert [first.wait(timeout=60), second.wait(timeout=60)] == [1, 1]
        assert "node 1 (" in first.said
        assert "node 0 (" in second.said
    assert not any(processes_of(node) for node in NODES)


def kill_node(number: int) -> None:
    for pid in processes_of(NODES[number]):
        os.kill(pid, signal.SIGKILL)


def test_what_the_rehearsal_is_made_of(nodes: None) -> None:
    """The nodes see one another over the link only, and nothing once it is down."""
    ping = ["ip", "netns", "exec", NODES[0], sys.executable, "-c", REACH, ADDRESSES[1]]
    with Running(["ip", "netns", "exec", NODES[1], sys.executable, "-c", ANSWER]) as answering:
        answering.wait_for("ready")
        assert json.loads(subprocess.run(ping, capture_output=True, text=True, check=True).stdout) is True
        set_link(0, "down")
        assert json.loads(subprocess.run(ping, capture_output=True, text=True, check=True).stdout) is False


ANSWER = (
    "import socket; s = socket.create_server(('', 5000)); print('ready', flush=True); [s.accept() for _ in range(9)]"
)
REACH = """
import json, socket, sys
try:
    socket.create_connection((sys.argv[1], 5000), timeout=2)
    print(json.dumps(True))
except OSError:
    print(json.dumps(False))
"""
