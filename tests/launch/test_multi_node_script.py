"""launch/multi_node.sh: what it makes of the variables of a node."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "multi_node.sh"


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PANGU": "echo pangu", **variables}
    return subprocess.run(["bash", str(SCRIPT), *command], env=environment, capture_output=True, text=True)


def test_variables_become_options() -> None:
    node = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    assert run("train", "my config", **node).stdout.strip() == (
        "pangu launch --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29400 --max-restarts 3 "
        "train my config"
    )
    said = run("train", "debug", **node, NPROC="8", MASTER_PORT="1234", MAX_RESTARTS="0").stdout
    assert "launch --nproc 8 --nnodes 2" in said
    assert "--master-port 1234 --max-restarts 0 train" in said


def test_a_variable_that_is_missing_is_named() -> None:
    answer = run("train", "debug", NNODES="2", MASTER_ADDR="10.0.0.1")
    assert answer.returncode != 0
    assert "NODE_RANK: the number of this node, from 0" in answer.stderr
