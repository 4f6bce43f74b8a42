"""What is to be started."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pangu.errors import LaunchError

STOPPED = 130
"""Exit code of a worker that saved a checkpoint after SIGINT or SIGTERM: not a failure, and no reason to restart."""

REFUSED = 2
"""Exit code of a worker whose input was refused: starting it again would change nothing."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One node's part of a job; everything but `node_rank` is the same on all nodes."""

    command: tuple[str, ...]
    """What every worker runs: the arguments of `program`."""
    nproc: int
    """Workers per node."""
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    """Where node 0 is reached."""
    master_port: int = 0
    """Where node 0's supervisor listens; 0, on one node only, is any free port."""
    max_restarts: int = 0
    """How often the workers are started again, from the newest checkpoint, after a failure or the loss of a node."""
    stop_seconds: float = 600.0
    """How long workers may take to save a checkpoint and end after SIGTERM."""
    join_seconds: float = 900.0
    """How long the other nodes may take to come, or to come back."""
    lost_seconds: float = 20.0
    """A node that gave no sign of life for so long is lost."""
    rank_table: Path | None = None
    """Where to write Ascend's rank table."""
    program: tuple[str, ...] = (sys.executable, "-m", "pangu")
    coordinates: Callable[[int], str] = field(default=lambda rank: "", compare=False)
    """Says where a rank is in the layout, such as "pp 0, tp 1"; an empty text for a command without a layout."""

    def __post_init__(self) -> None:
        if self.nproc < 1 or self.nnodes < 1:
            raise LaunchError(f"--nproc {self.nproc} and --nnodes {self.nnodes} must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise LaunchError(
                f"--node-rank {self.node_rank} is not between 0 and {self.nnodes - 1} (--nnodes {self.nnodes})"
            )
        if self.nnodes > 1 and not self.master_port:
            raise LaunchError(f"--master-port must be given, the same on all {self.nnodes} nodes")
        if not 0 <= self.master_port < 65536:
            raise LaunchError(f"--master-port {self.master_port} is not between 0 and 65535")
        if self.max_restarts < 0:
            raise LaunchError(f"--max-restarts {self.max_restarts} must not be negative")

    @property
    def digest(self) -> str:
        """Equal on two nodes if they were started with the same command."""
        command = [word for word in self.command if word != "--resume"]
        same = json.dumps([command, self.nproc, self.nnodes, self.max_restarts, self.rank_table is not None])
        return hashlib.sha256(same.encode()).hexdigest()

    def resumed_command(self) -> tuple[str, ...]:
        """The command that goes on from the newest checkpoint."""
        if self.command[:1] != ("train",) or "--resume" in self.command:
            return self.command
        return (*self.command, "--resume")

    def worker_command(self, *, resume: bool) -> list[str]:
        """What workers run."""
        return [*self.program, *(self.resumed_command() if resume else self.command)]

    def launcher_command(self) -> list[str]:
        """The command, without what workers run, that makes a machine this job's node `node_rank`."""
        options: dict[str, object] = {
            "nproc": self.nproc,
            "nnodes": self.nnodes,
            "node-rank": self.node_rank,
            "master-addr": self.master_addr,
            "master-port": self.master_port,
            "max-restarts": self.max_restarts,
            "stop-seconds": self.stop_seconds,
            "join-seconds": self.join_seconds,
            "lost-seconds": self.lost_seconds,
        }
        if self.rank_table:
            options["rank-table"] = self.rank_table
        return [*self.program, "launch", *(f"--{name}={value}" for name, value in options.items())]

    def describe_rank(self, rank: int) -> str:
        """`rank 5 (pp 1, ..., tp 1)`."""
        where = self.coordinates(rank)
        return f"rank {rank} ({where})" if where else f"rank {rank}"

    def describe_ranks(self, node_rank: int) -> str:
        """The ranks of a node, each with its coordinates when they are few."""
        ranks = range(node_rank * self.nproc, (node_rank + 1) * self.nproc)
        if self.nproc > 16:
            return f"ranks {ranks[0]} to {ranks[-1]}"
        return ", ".join(map(self.describe_rank, ranks))
