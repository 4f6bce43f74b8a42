"""launch/slurm.sbatch on a real Slurm: munged, slurmctld and two slurmd, all on this machine."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_helpers import free_port, wait_until

from pangu.train.events import read_events

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
STEPS = ("--train.steps", "4", "--metrics.tensorboard", "false")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running cluster with the nodes n0 and n1, in the environment as SLURM_CONF."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    if os.getuid() != 0:
        pytest.skip("needs root: slurmd starts jobs as their user")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "slurm.conf").write_text(configuration(folder))
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge.sock", *files],
        ["slurmctld", "-c", "-i", "-D"],
        ["slurmd", "-N", "n0", "-D"],
        ["slurmd", "-N", "n1", "-D"],
    ]
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    running = []
    try:
        for command in commands:
            program = shutil.which(command[0], path=path)
            assert program
            with (folder / f"{command[0]}.out").open("a") as output:
                running.append(subprocess.Popen([program, *command[1:]], stdout=output, stderr=output))
            if command[0] == "munged":
                wait_until((folder / "munge.sock").exists, "for munged")
        wait_until(lambda: ask("sinfo", "--noheader", "--format=%T") == "idle", "for both nodes")
        yield folder
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait()
        del os.environ["SLURM_CONF"]


def configuration(folder: Path) -> str:
    host = socket.gethostname().split(".")[0]
    nodes = [
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1" for number in range(2)
    ]
    lines = [
        "ClusterName=pangu",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={free_port()}",
        "SlurmUser=root",
        "SlurmdUser=root",
        f"AuthInfo=socket={folder}/munge.sock",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/%n.pid",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/linear",
        "ReturnToService=2",
        *nodes,
        "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]
    return "\n".join(lines) + "\n"


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def submit(folder: Path, *command: str, **variables: object) -> tuple[str, Path]:
    """The job's number and its log."""
    environment = {
        **os.environ,
        "PANGU": f"{sys.executable} -m pangu",
        "NPROC": "1",
        "PORT": str(free_port()),
        **variables,
    }
    log = folder / f"{free_port()}.log"
    answer = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", f"--output={log}", "launch/slurm.sbatch", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout.strip(), log


def wait_for_end(job: str, log: Path) -> str:
    """The job's last state and exit code."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_until(
        lambda: any(f"JobState={state}" in ask("scontrol", "show", "job", job) for state in ended), "for its end"
    )
    print(log.read_text())
    words = ask("scontrol", "show", "job", job).split()
    return " ".join(word for word in words if word.startswith(("JobState=", "ExitCode=")))


def test_two_nodes_train_one_model(slurm: Path, tmp_path: Path) -> None:
    # The nodes are one machine, whose name MASTER_ADDR must not be taken from.
    job, log = submit(slurm, "train", "debug", "--output", str(tmp_path / "run"), *STEPS, MASTER="127.0.0.1")
    assert wait_for_end(job, log) == "JobState=COMPLETED ExitCode=0:0"
    assert "dp_shard      2     0, 1" in log.read_text()
    assert [event["step"] for event in read_events(tmp_path / "run") if event["kind"] == "step"] == [1, 2, 3, 4]


def test_slurms_sigterm_leaves_a_checkpoint(slurm: Path, tmp_path: Path) -> None:
    """scancel has Slurm signal every process of the job, and the launchers their workers once more."""
    steps = ("--train.steps", "100000", "--checkpoint.interval", "0", "--metrics.tensorboard", "false")
    job, log = submit(slurm, "train", "debug", "--output", str(tmp_path / "run"), *steps, MASTER="127.0.0.1")
    wait_until(lambda: log.exists() and " 2/100000 " in log.read_text(), "for the second step")
    ask("scancel", "--signal=TERM", job)
    wait_for_end(job, log)
    assert "the checkpoint is written" in log.read_text()
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1


def test_a_failure_fails_the_job(slurm: Path, tmp_path: Path) -> None:
    job, log = submit(
        slurm, "train", "debug", "--output", str(tmp_path / "run"), "--train.device", "cuda", MASTER="127.0.0.1"
    )
    assert wait_for_end(job, log) == "JobState=FAILED ExitCode=2:0"
    assert "failed: DeviceError: device 'cuda' needs a CUDA build of PyTorch" in log.read_text()
