"""One command on every host of a list: over an `ssh` that runs everything here, and over a real sshd on loopback."""

import getpass
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_helpers import Running, free_port, runs, wait_until

from pangu.errors import LaunchError
from pangu.launch import parse_hosts, processes_per_host, read_hosts
from pangu.launch.hosts import Host
from pangu.train.events import read_events

ROOT = Path(__file__).resolve().parents[2]
FEW_STEPS = ("--train.steps", "4", "--checkpoint.interval", "1", "--metrics.tensorboard", "false")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_host_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "hosts", "node1 slots=8  # the first\n\n# none here\nnode2\n")
    assert read_hosts(path) == [Host("node1", 8), Host("node2", None)]
    assert parse_hosts("a, b") == [Host("a"), Host("b")]
    assert parse_hosts("") == []
    assert processes_per_host(read_hosts(path), None) == 8
    assert processes_per_host(parse_hosts("a,b"), 4) == 4
    assert processes_per_host(parse_hosts("a,b"), None) == 1


@pytest.mark.parametrize("line", ["node1 8", "node1 slots=x", "node1 slots=1 slots=2", "-oProxyCommand=x"])
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="line 2"):
        read_hosts(write(tmp_path / "hosts", f"good\n{line}\n"))


def test_what_cannot_be_a_list_is_refused(tmp_path: Path) -> None:
    for text in ("a,,b", "a,-oProxyCommand=x"):
        with pytest.raises(LaunchError, match="--nodes"):
            parse_hosts(text)
    with pytest.raises(LaunchError, match="names no host"):
        read_hosts(write(tmp_path / "empty", "# nobody\n"))
    with pytest.raises(LaunchError, match="No such file"):
        read_hosts(tmp_path / "missing")
    with pytest.raises(LaunchError, match="must be equal"):
        processes_per_host([Host("a", 8), Host("b", 4)], None)
    with pytest.raises(LaunchError, match="must be equal"):
        processes_per_host([Host("a", 8)], 4)


@pytest.fixture
def local_ssh(tmp_path: Path) -> Path:
    """An `ssh` that runs the command here, in the home of nobody, and notes its process id."""
    path = tmp_path / "bin" / "ssh"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\necho $$ > "{tmp_path}/$1.pid"\ncd /\nexec sh -c "$2"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path.parent


def launch(*words: object, ssh: Path | None = None) -> Running:
    path = f"{ssh}{os.pathsep}{os.environ['PATH']}" if ssh else os.environ["PATH"]
    command = [sys.executable, "-m", "pangu", "launch", *map(str, words)]
    return Running(command, cwd=ROOT, env={**os.environ, "PATH": path})


def test_two_hosts_train_one_model(local_ssh: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    nodes = ("--nodes", "127.0.0.1,localhost", "--master-port", free_port())
    with launch(*nodes, "train", "debug", "--output", run, *FEW_STEPS, ssh=local_ssh) as launcher:
        assert launcher.wait() == 0
        assert "[127.0.0.1] dp_shard      2     0, 1" in launcher.said
    assert [event["step"] for event in read_events(run) if event["kind"] == "step"] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_lost_host_is_started_again(local_ssh: Path, tmp_path: Path) -> None:
    """Its launcher is killed in step 2 or later; the job goes on from the last checkpoint to the same losses."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    hosts = write(tmp_path / "hosts", "127.0.0.1\nlocalhost\n")
    options = ("--hosts", hosts, "--master-port", free_port(), "--max-restarts", "1")
    steps = ("--train.steps", "60", *FEW_STEPS[2:])
    with launch(*options, "train", "debug", "--output", run, *steps, ssh=local_ssh) as launcher:
        launcher.wait_for(" 2/60 ")
        os.kill(int((tmp_path / "localhost.pid").read_text()), signal.SIGKILL)
        assert launcher.wait() == 0
        assert "pangu: localhost is lost (exit code -9 of ssh); starting its command again" in launcher.said
        assert "[127.0.0.1] pangu: node 1 (" in launcher.said
    with launch("--nproc", 2, "train", "debug", "--output", straight, *steps) as launcher:
        assert launcher.wait() == 0
    losses = [[event["loss"] for event in read_events(folder) if event["kind"] == "step"] for folder in (run, straight)]
    assert len(losses[0]) == 60
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_sigterm_here_stops_every_host_after_a_checkpoint(local_ssh: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    nodes = ("--nodes", "127.0.0.1,localhost", "--master-port", free_port())
    steps = ("--train.steps", "100000", "--checkpoint.interval", "0", "--metrics.tensorboard", "false")
    with launch(*nodes, "train", "debug", "--output", run, *steps, ssh=local_ssh) as launcher:
        launcher.wait_for(" 2/100000 ")
        launcher.signal(signal.SIGTERM)
        assert launcher.wait() == 130
        assert "the checkpoint is written" in launcher.said
    assert len(list((run / "checkpoints").glob("step_*"))) == 1


def test_hosts_end_when_one_fails(local_ssh: Path, tmp_path: Path) -> None:
    nodes = ("--nodes", "127.0.0.1,localhost", "--master-port", free_port())
    words = ("train", "debug", "--output", tmp_path / "run", "--train.device", "cuda")
    with launch(*nodes, "--nproc", 1, *words, ssh=local_ssh) as launcher:
        assert launcher.wait() == 2
        assert "failed: DeviceError: device 'cuda' needs a CUDA build of PyTorch" in launcher.said
    for name in ("127.0.0.1", "localhost"):
        assert not runs(int((tmp_path / f"{name}.pid").read_text()))


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[str]:
    """A real sshd on loopback; the command that reaches it."""
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if server is None or shutil.which("ssh") is None:
        pytest.skip("needs sshd and ssh: apt-get install openssh-server openssh-client")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd, as root, separates its privileges
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    shutil.copy(tmp_path / "key.pub", tmp_path / "authorized_keys")
    port = free_port()
    configuration = write(
        tmp_path / "sshd_config",
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host_key\nPidFile {tmp_path}/sshd.pid\n"
        f"AuthorizedKeysFile {tmp_path}/authorized_keys\nStrictModes no\nPermitRootLogin yes\nUsePAM no\n",
    )
    process = subprocess.Popen([server, "-D", "-e", "-f", configuration], stderr=subprocess.DEVNULL)
    known = f"-oUserKnownHostsFile={tmp_path}/known -oStrictHostKeyChecking=accept-new"
    command = f"ssh -p {port} -i {tmp_path}/key -l {getpass.getuser()} -oBatchMode=yes -oConnectionAttempts=20 {known}"
    try:
        yield command
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_over_a_real_sshd(sshd: str, tmp_path: Path) -> None:
    """Training ends well; then ssh is killed in another run, and the far end stops by itself, after a checkpoint."""
    run = tmp_path / "run"
    options = ("--ssh", sshd, "--nodes", "127.0.0.1,localhost", "--master-port", free_port())
    with launch(*options, "train", "debug", "--output", run, *FEW_STEPS) as launcher:
        assert launcher.wait() == 0, launcher.said
        assert "[127.0.0.1]       4/4" in launcher.said
    assert [event["step"] for event in read_events(run) if event["kind"] == "step"] == [1, 2, 3, 4]

    steps = ("--train.steps", "100000", "--checkpoint.interval", "0", "--metrics.tensorboard", "false")
    with launch(*options, "train", "debug", "--output", tmp_path / "cut", *steps) as launcher:
        launcher.wait_for(" 2/100000 ")
        launcher.signal(signal.SIGKILL)
        launcher.process.wait()
        wait_until(lambda: list((tmp_path / "cut" / "checkpoints").glob("step_*")), "for the checkpoint")
