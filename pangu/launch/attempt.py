"""One attempt on one node, as its supervisor sees it: the agent's process, what it is asked and what it reports."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pangu.launch.interface import interface_of
from pangu.launch.job import Job

_SET_BY_SCHEDULERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Kubernetes operators count nodes with them, where workers count processes."""


@dataclass(frozen=True)
class Request:
    """What the agent's process is to do."""

    command: list[str]
    nproc: int
    nnodes: int
    node_rank: int
    address: str
    port: int
    run_id: str
    join_seconds: float
    stop_seconds: float
    folder: str
    """For torch's own files."""
    report: str
    """Where failures are written."""


@dataclass(frozen=True)
class Failure:
    """How one worker ended that did not end well."""

    rank: int
    exitcode: int
    """Negative: the signal that killed it."""
    message: str
    """Type and text of its exception, if it left one."""
    order: int
    """0 for the first of the node to end."""

    def describe(self) -> str:
        if self.exitcode < 0:
            return f"was killed by {signal.Signals(-self.exitcode).name}"
        return f"failed: {self.message}" if self.message else f"ended with exit code {self.exitcode}"


class Attempt:
    """The agent's process."""

    def __init__(self, job: Job, start: dict[str, Any], own_address: str, folder: Path) -> None:
        """Start it as the coordinator's message `start` says; `own_address` is this node's."""
        self.stopping = False
        self._report = folder / "report.json"
        request = Request(
            command=job.worker_command(resume=start["resume"]),
            nproc=job.nproc,
            nnodes=job.nnodes,
            node_rank=job.node_rank,
            address=start["address"],
            port=start["port"],
            run_id=str(start["attempt"]),
            join_seconds=job.join_seconds,
            stop_seconds=job.stop_seconds,
            folder=str(folder),
            report=str(self._report),
        )
        path = folder / "request.json"
        path.write_text(json.dumps(asdict(request)))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pangu.launch.agent", str(path)],
            env=_environment(job, own_address),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for the supervisor, which passes it on once
        )

    def stop(self) -> None:
        """Ask the workers to end after a checkpoint."""
        if not self.stopping:
            self.stopping = True
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the workers at once."""
        self._signal(signal.SIGUSR1)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def failures(self) -> list[Failure]:
        """The workers that did not end well, the first one first."""
        if not self._report.is_file():
            return []
        return sorted(
            (Failure(**entry) for entry in json.loads(self._report.read_text())), key=lambda failure: failure.order
        )

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


def _environment(job: Job, own_address: str) -> dict[str, str]:
    environment: dict[str, Any] = {key: text for key, text in os.environ.items() if key not in _SET_BY_SCHEDULERS}
    if job.nproc > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun: else every worker takes all cores
    if job.rank_table:
        environment["RANK_TABLE_FILE"] = str(job.rank_table.resolve())
    interface = interface_of(own_address) if job.nnodes > 1 else None
    if interface:
        for library in ("GLOO", "HCCL", "NCCL"):
            environment.setdefault(f"{library}_SOCKET_IFNAME", interface)
    return environment
