"""One command on every host of a list, over ssh: each becomes a node of the job.

The local end prefixes every host's output with its name, ends all when one fails for good, and starts a host's command
again when the host was lost and restarts are left. A remote end stops, with a checkpoint, when its standard input
closes: so it also does when the connection or the local end dies.
"""

import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pangu.errors import LaunchError
from pangu.launch.job import REFUSED, STOPPED, Job
from pangu.launch.node import POLL_SECONDS, collected_signals, say

EXPORTED = (
    *("ASCEND", "CPU_AFFINITY", "CUDA", "GLOO", "HCCL", "LD_LIBRARY_PATH", "MULTI_STREAM", "NCCL"),
    *("OMP_", "PATH", "PYTHONPATH", "PYTORCH", "TASK_QUEUE", "TORCH"),
)
"""Beginnings of the names of the environment variables that hosts get from here."""

FINAL = (0, 1, REFUSED, STOPPED)
"""Exit codes with which a node ends of its own accord. Any other means that the node, or ssh's way to it, is lost."""

OTHERS_END_SECONDS = 15.0
"""What the other hosts have to end by themselves after one has failed."""


@dataclass(frozen=True)
class Host:
    name: str
    slots: int | None = None
    """Workers on this host; not given: `--nproc`."""


def read_hosts(path: Path) -> list[Host]:
    """One host a line, `name` or `name slots=8`; `#` starts a comment. Raises `LaunchError` naming the line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise LaunchError(f"--hosts {path}: {error.strerror}") from None
    hosts = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        name, *options = words
        match = re.fullmatch(r"(slots=(\d+))?", " ".join(options))
        if match is None or name.startswith("-"):
            raise LaunchError(f"--hosts {path}, line {number}: {line.strip()!r} is neither `name` nor `name slots=8`")
        hosts.append(Host(name, int(match[2]) if match[2] else None))
    if not hosts:
        raise LaunchError(f"--hosts {path} names no host")
    return hosts


def parse_hosts(text: str) -> list[Host]:
    """The hosts of `a,b,c`."""
    names = [name.strip() for name in text.split(",")] if text else []
    if any(not name or name.startswith("-") for name in names):
        raise LaunchError(f"--nodes {text!r} must be host names with commas between them")
    return [Host(name) for name in names]


def processes_per_host(hosts: Sequence[Host], nproc: int | None) -> int:
    """Workers per host by `--nproc` and the list, which must agree: a layout has equal nodes. 1 if neither says."""
    counts = {count for count in (nproc, *(host.slots for host in hosts)) if count is not None}
    if len(counts) > 1:
        raise LaunchError(f"--nproc and slots= say {sorted(counts)} workers per host; all must be equal")
    return counts.pop() if counts else 1


def launch_hosts(hosts: Sequence[Host], job: Job, ssh: Sequence[str] = ("ssh",)) -> int:
    """Run `job` with node N on the N-th host; returns the exit code of the first node that failed, else the highest.

    `ssh` may hold options, as in `ssh -p 2222`. Hosts need the same folder and Python at the same paths.
    """
    with collected_signals() as signals:
        remotes = [_Remote(host, replace(job, node_rank=rank), ssh) for rank, host in enumerate(hosts)]
        try:
            return _watch(remotes, job.max_restarts, signals)
        finally:
            for remote in remotes:
                remote.kill()


def _watch(remotes: Sequence["_Remote"], max_restarts: int, signals: list[int]) -> int:
    stopping, deadline, codes = False, float("inf"), dict[int, int]()
    while len(codes) < len(remotes) and time.monotonic() < deadline and len(signals) < 2:
        time.sleep(POLL_SECONDS)
        if signals and not stopping:
            stopping = True
            for remote in remotes:
                remote.stop()
        for rank, remote in enumerate(remotes):
            code = remote.process.poll()
            if rank in codes or code is None:
                continue
            lost = code not in FINAL or (code == STOPPED and not stopping)
            if lost and not stopping and remote.starts <= max_restarts:
                say(f"{remote.host.name} is lost (exit code {code} of ssh); starting its command again")
                remote.start(resume=True)
                continue
            codes[rank] = code
            if code not in (0, STOPPED):
                say(f"{remote.host.name} ended with exit code {code}; ending the others")
                deadline = min(deadline, time.monotonic() + OTHERS_END_SECONDS)
    failed = [code for code in codes.values() if code not in (0, STOPPED)]
    return failed[0] if failed else STOPPED if signals else max(codes.values())


class _Remote:
    """The ssh process of one host."""

    def __init__(self, host: Host, job: Job, ssh: Sequence[str]) -> None:
        self.host = host
        self.job = job
        self.ssh = ssh
        self.starts = 0
        self.start(resume=False)

    def start(self, *, resume: bool) -> None:
        self.starts += 1
        self.process = subprocess.Popen(
            [*self.ssh, self.host.name, _remote_command(self.job, resume)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal is for this end, which passes it on once
        )
        self._printer = threading.Thread(target=self._print, args=(self.process,), daemon=True)
        self._printer.start()

    def stop(self) -> None:
        """Closing its standard input has the remote end stop after a checkpoint."""
        assert self.process.stdin
        self.process.stdin.close()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self._printer.join(timeout=5)

    def _print(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            print(f"[{self.host.name}] {text}", flush=True)


def _remote_command(job: Job, resume: bool) -> str:
    """What the remote shell runs."""
    exported = [f"{name}={text}" for name, text in sorted(os.environ.items()) if name.startswith(EXPORTED)]
    command = ["env", *exported, *job.launcher_command(), "--stop-with-stdin"]
    command += ["--", *(job.resumed_command() if resume else job.command)]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}"
