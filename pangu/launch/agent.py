"""One attempt on one node: PyTorch's elastic agent, which torchrun runs, around the node's workers.

`python -m pangu.launch.agent REQUEST` is a process of its own, so that its supervisor can end it whatever it is waiting
for. REQUEST is a JSON file with the fields of `Request`; how workers failed is written to `report`, a JSON list of
`Failure`s. SIGTERM and SIGINT are passed on to the workers, which have `stop_seconds` to end; SIGUSR1 kills them.
"""

import json
import logging
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from pangu.launch.attempt import Failure, Request
from pangu.launch.job import STOPPED
from pangu.launch.process import die_with_parent

FAILURE_GRACE_SECONDS = 3.0
"""What a failed worker's neighbours have to say why they end, too, before they are killed."""


class Agent(LocalElasticAgent):
    """Ends the other workers soon after one failed, and remembers the order in which they ended."""

    def __init__(self, request: Request) -> None:
        rendezvous = StaticTCPRendezvous(
            request.address,
            request.port,
            request.node_rank,
            request.nnodes,
            request.run_id,
            int(request.join_seconds),
        )
        spec = WorkerSpec(
            role="pangu",
            local_world_size=request.nproc,
            entrypoint=sys.executable,
            args=("-m", "pangu.launch.worker", *request.command),
            rdzv_handler=rendezvous,
            max_restarts=0,
            monitor_interval=0.2,
            master_addr=request.address,
            master_port=request.port,
            local_addr=request.address if request.node_rank == 0 else None,
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=request.folder), shutdown_timeout=int(request.stop_seconds))
        self.request = request
        self.ended: list[int] = []
        self.killed: list[int] = []

    def failures(self, messages: dict[int, str]) -> list[Failure]:
        """Of the workers that ended by themselves; `messages` are their last words by local rank."""
        first_rank = self.request.node_rank * self.request.nproc
        return [
            Failure(first_rank + rank, code, messages.get(rank, ""), self.ended.index(rank))
            for rank, code in self._exit_codes().items()
            if code and rank not in self.killed
        ]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # The base class gives the others 30 s and says nothing meanwhile.
        codes = self._exit_codes()
        if any(codes.values()):
            stopping = set(codes.values()) <= {0, STOPPED, None}
            deadline = time.monotonic() + (self.request.stop_seconds if stopping else FAILURE_GRACE_SECONDS)
            while None in self._exit_codes().values() and time.monotonic() < deadline:
                time.sleep(0.02)
            if not stopping:
                self.killed += [rank for rank, code in self._exit_codes().items() if code is None]
            self._kill()
        return super()._monitor_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # schedulers that signal every process would cut the wait short
        if death_sig == signal.SIGUSR1:
            self._kill()
        super()._shutdown(death_sig, timeout)

    def _exit_codes(self) -> dict[int, int | None]:
        """By local rank; None for workers that still run."""
        context = self._pcontext
        if not isinstance(context, SubprocessContext):
            return {}
        codes = {rank: handler.proc.poll() for rank, handler in context.subprocess_handlers.items()}
        self.ended += [rank for rank, code in codes.items() if code is not None and rank not in self.ended]
        return codes

    def _kill(self) -> None:
        if isinstance(self._pcontext, SubprocessContext):
            for handler in self._pcontext.subprocess_handlers.values():
                if handler.proc.poll() is None:
                    handler.close(signal.SIGKILL)
                    handler.proc.wait()


def main(request_path: str) -> int:
    die_with_parent(signal.SIGTERM)
    logging.disable(logging.ERROR)  # what torch says of a failure, the supervisor says with coordinates
    request = Request(**json.loads(Path(request_path).read_text()))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGUSR1"
    agent = Agent(request)
    messages: dict[int, str] = {}
    try:
        result = agent.run()
        ended_well = result is not None and result.state == WorkerState.SUCCEEDED
        messages = {failure.local_rank: _message(failure) for failure in (result.failures if result else {}).values()}
    except SignalException:
        ended_well = False
    failures = agent.failures(messages)
    Path(request.report).write_text(json.dumps([asdict(failure) for failure in failures]))
    return 0 if ended_well and not failures else 1


def _message(failure: ProcessFailure) -> str:
    message = failure.error_file_data.get("message")
    return message.get("message", "") if isinstance(message, dict) else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
