"""One node's supervisor: starts the node's workers, ends them, and starts them again when a restart is left."""

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from pangu.errors import LaunchError
from pangu.launch import rank_table
from pangu.launch.attempt import Attempt, Failure
from pangu.launch.job import REFUSED, STOPPED, Job
from pangu.launch.meeting import FAILED, KILLED, LOST_PEER, ConnectionLostError, Coordinator, Member, Message
from pangu.launch.process import output_nobody_needs_to_read

POLL_SECONDS = 0.2

_LOST_PEER_SIGNS = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "DistNetworkError")


def launch_node(job: Job, *, stop_with_stdin: bool = False) -> int:
    """Run this node's part of `job`; returns the exit code for the shell.

    With `stop_with_stdin` the end of standard input stops it as SIGTERM does.

    0: all workers of all nodes ended well. 130: stopped by a signal, with a checkpoint. 2: the workers refused their
    input. 1: anything else, said on stderr with the rank and its coordinates, or the node that is lost.
    """
    devices = rank_table.devices_of_node(job.nproc) if job.rank_table else []
    with collected_signals() as signals, output_nobody_needs_to_read() if stop_with_stdin else nullcontext():
        if stop_with_stdin:
            threading.Thread(target=_stop_at_end_of_stdin, args=(signals,), daemon=True).start()
        if job.node_rank:
            return _Supervisor(job, job.master_port, devices, signals).run()
        coordinator = _coordinator(job)
        supervisor = _Supervisor(job, coordinator.port, devices, signals)
        try:
            return supervisor.run()
        finally:
            coordinator.close(at_once=not supervisor.ended)


def _coordinator(job: Job) -> Coordinator:
    try:
        return Coordinator(job)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise LaunchError(f"--master-port {job.master_port}: {reason}; choose another") from None


class _StoppedError(Exception):
    """A signal came while no worker was running, or a second one."""


class _Supervisor:
    def __init__(self, job: Job, port: int, devices: list[rank_table.Device], signals: list[int]) -> None:
        self.job = job
        self.port = port
        self.devices = devices
        self.signals = signals
        self.host = socket.gethostname()
        self.started = self.stop_sent = False
        self.ended = False

    def run(self) -> int:
        losses = 0  # of node 0; all other restarts are counted there
        while True:
            try:
                member = self._connect()
                try:
                    return self._attempts(member)
                finally:
                    member.close()
            except _StoppedError:
                return STOPPED
            except ConnectionLostError as error:
                say(f"node 0 ({self.job.master_addr}) is lost: {error}; it held {self.job.describe_ranks(0)}")
                losses += 1
                if losses > self.job.max_restarts:
                    return 1
                say("waiting for node 0 to come back")

    def _connect(self) -> Member:
        address = "127.0.0.1" if self.job.node_rank == 0 else self.job.master_addr
        deadline = time.monotonic() + self.job.join_seconds
        while not self.signals:
            try:
                return Member.connect(address, self.port, self.job.lost_seconds)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"node 0 did not answer at {address}:{self.port} for {self.job.join_seconds:g} s "
                        f"({error.strerror or error}); check --master-addr and --master-port"
                    ) from None
                time.sleep(1)
        raise _StoppedError

    def _attempts(self, member: Member) -> int:
        """Attempt after attempt until the coordinator says how the job ended; returns the exit code."""
        while True:
            member.send(
                "join",
                node=self.job.node_rank,
                host=self.host,
                digest=self.job.digest,
                devices=[asdict(device) for device in self.devices],
                started=self.started,
            )
            verdict = self._wait_for(member, "start", "abort", patience=0)
            if verdict["kind"] == "start":
                verdict = self._attempt(member, verdict)
            if verdict["kind"] == "abort":
                say(verdict["text"])
                if verdict["restart"]:
                    say("starting again from the newest checkpoint as soon as all nodes are there")
                    continue
            self.ended = True
            return verdict["code"]

    def _attempt(self, member: Member, start: Message) -> Message:
        """Run the workers once; returns the coordinator's verdict."""
        if self.job.rank_table:
            rank_table.write(self.job.rank_table, start["servers"])
        with tempfile.TemporaryDirectory(prefix="pangu-launch-") as folder:
            attempt = Attempt(self.job, start, member.address, Path(folder))
            self.started = True
            try:
                while attempt.process.poll() is None:
                    message = member.receive(POLL_SECONDS)
                    if message and message["kind"] == "abort":
                        return message
                    if message and message["kind"] == "stop":
                        attempt.stop()
                    self._pass_on_signals(member, patience=1)
                    if self.signals:
                        attempt.stop()
                self._report(member, attempt)
                return self._wait_for(member, "finish", "abort", patience=1)
            finally:
                attempt.kill()

    def _report(self, member: Member, attempt: Attempt) -> None:
        """Tell the coordinator how this node's workers ended."""
        bad = [failure for failure in attempt.failures() if failure.exitcode != STOPPED]
        if attempt.stopping:
            bad = [failure for failure in bad if failure.exitcode not in (-signal.SIGTERM, -signal.SIGINT)]
        if bad:
            first = max(bad, key=_severity)  # of equals, the first to end
            text = f"{self.job.describe_rank(first.rank)} on node {self.job.node_rank} ({self.host}) {first.describe()}"
            if attempt.stopping and first.exitcode == -signal.SIGKILL:
                text += f", {self.job.stop_seconds:g} s after it was asked to stop"
            code = REFUSED if first.exitcode == REFUSED else 1
            member.send("failed", text=text, code=code, severity=_severity(first))
        elif attempt.stopping or attempt.failures():
            member.send("done", code=STOPPED)
        elif attempt.process.returncode == 0:
            member.send("done", code=0)
        else:
            text = f"the agent of node {self.job.node_rank} ({self.host}) ended with {attempt.process.returncode}"
            member.send("failed", text=text, code=1, severity=FAILED)

    def _wait_for(self, member: Member, *kinds: str, patience: int) -> Message:
        while True:
            message = member.receive(POLL_SECONDS)
            if message and message["kind"] in kinds:
                return message
            self._pass_on_signals(member, patience)

    def _pass_on_signals(self, member: Member, patience: int) -> None:
        """Have all nodes stop after a checkpoint; more signals than `patience` end this node at once."""
        if len(self.signals) > patience:
            raise _StoppedError
        if self.signals and not self.stop_sent:
            say(f"{signal.Signals(self.signals[0]).name}: the workers end after a checkpoint")
            member.send("stop")
            self.stop_sent = True


def _severity(failure: Failure) -> int:
    if failure.exitcode < 0:
        return KILLED
    return LOST_PEER if any(sign in failure.message for sign in _LOST_PEER_SIGNS) else FAILED


def _stop_at_end_of_stdin(signals: list[int]) -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
        pass
    signals.append(signal.SIGTERM)


def say(text: str) -> None:
    print(f"pangu: {text}", file=sys.stderr, flush=True)


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; the second one ends the workers without waiting for a checkpoint."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
