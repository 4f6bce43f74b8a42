"""How the supervisors of a job's nodes meet, keep in touch and decide together.

Node 0's supervisor runs a `Coordinator`; every supervisor, node 0's included, is a `Member` connected to it. Messages
are JSON, one a line, `{"kind": ..., ...}`:

    to the coordinator                            to the members
    join    node, host, digest, devices, started  start    attempt, resume, address, port, servers
    done    code: all workers of the node ended   abort    text, code, restart: a node failed or is lost
    failed  text, code, severity                  stop     end the workers after a checkpoint
    stop    somebody sent the node a signal       finish   code: every node is done
    beat    every second                          beat     every second

A node is lost when its connection closes or has been silent for `lost_seconds`: a cut link looks like nothing at all.
This is for the inside of a cluster: whoever can reach the port can end the job, as with torchrun.
"""

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pangu.launch.job import REFUSED, Job

BEAT_SECONDS = 1.0
SETTLE_SECONDS = 2.0
"""After a first failure, how long reports are collected before one is named the cause: a dead worker's peers fail too,
and often report first."""
CLOSING_SECONDS = 5.0

LOST_PEER, FAILED, KILLED, LOST_NODE = range(4)
"""Severities: a worker that lost a peer is a consequence; an exception, a death by signal, a lost node are causes."""

Message = dict[str, Any]


class ConnectionLostError(Exception):
    """The other end closed the connection or has been silent for too long; the text says which."""


class Connection:
    """Messages over a TCP socket, with signs of life in both directions."""

    def __init__(self, connected: socket.socket, lost_seconds: float) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connected
        self.lost_seconds = lost_seconds
        self.heard = time.monotonic()
        self._beaten = 0.0
        self._received = b""

    def send(self, kind: str, **values: Any) -> None:
        """Raises `ConnectionLostError`."""
        self.socket.settimeout(self.lost_seconds)
        try:
            self.socket.sendall(json.dumps({"kind": kind, **values}).encode() + b"\n")
        except OSError as error:
            raise ConnectionLostError(str(error)) from error
        finally:
            self.socket.setblocking(False)

    def beat(self) -> None:
        """Give a sign of life if one is due, and look for one of the other end. Raises `ConnectionLostError`."""
        now = time.monotonic()
        if now - self._beaten >= BEAT_SECONDS:
            self._beaten = now
            self.send("beat")
        if self.silent > self.lost_seconds:
            raise ConnectionLostError(f"no sign of life for {self.lost_seconds:g} s")

    @property
    def silent(self) -> float:
        """Seconds since anything was heard."""
        return time.monotonic() - self.heard

    def receive(self) -> list[Message]:
        """The whole messages that have arrived, without waiting. Raises `ConnectionLostError`."""
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ConnectionLostError(str(error)) from error
        if not data:
            raise ConnectionLostError("its connection was closed")
        self.heard = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
            return [message for message in messages if message["kind"] != "beat"]
        except (ValueError, TypeError, KeyError):
            raise ConnectionLostError("it sent something that is not a message") from None

    def close(self) -> None:
        self.socket.close()


class Member:
    """A supervisor's connection to the coordinator."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.address: str = connection.socket.getsockname()[0]
        self._waiting: list[Message] = []

    @classmethod
    def connect(cls, address: str, port: int, lost_seconds: float) -> "Member":
        """Raises `OSError` when nobody listens there."""
        return cls(Connection(socket.create_connection((address, port), timeout=lost_seconds), lost_seconds))

    def send(self, kind: str, **values: Any) -> None:
        self.connection.send(kind, **values)

    def receive(self, timeout: float) -> Message | None:
        """The next message, waiting up to `timeout` seconds for it. Raises `ConnectionLostError`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection.socket, selectors.EVENT_READ)
            if not self._waiting and selector.select(timeout):
                self._waiting += self.connection.receive()
        self.connection.beat()
        return self._waiting.pop(0) if self._waiting else None

    def close(self) -> None:
        self.connection.close()


@dataclass
class _Node:
    """What the coordinator knows of one node."""

    connection: Connection | None = None
    host: str = "never seen"
    devices: Any = None
    joined: bool = False
    code: int | None = None


@dataclass(order=True)
class _Cause:
    severity: int
    text: str = field(compare=False)
    code: int = field(compare=False)


class Coordinator:
    """Decides for all nodes when workers start, end and are started again; a thread of node 0's supervisor."""

    def __init__(self, job: Job) -> None:
        """Listens at once. Raises `OSError` when the port is taken."""
        self.job = job
        alone = job.nnodes == 1
        self._listener = socket.create_server(("127.0.0.1" if alone else "", job.master_port), backlog=job.nnodes + 8)
        self.port: int = self._listener.getsockname()[1]
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._nodes = [_Node() for _ in range(job.nnodes)]
        self._strangers: list[Connection] = []  # connected, but not yet joined
        self._attempt = 0
        self._resume = False  # whether any node has started workers before: its checkpoints are to be gone on from
        self._running = self._stopping = self._finished = self._closed = False
        self._causes: list[_Cause] = []
        self._deadline = time.monotonic() + job.join_seconds  # for joining, or for settling on a cause
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._thread.start()

    def close(self, *, at_once: bool = False) -> None:
        """End when every node has heard how the job ended, or at once."""
        self._closed = at_once
        self._thread.join()

    def _run(self) -> None:
        # Once finished it stays until the others have closed, so that its last words reach them.
        while not self._closed and (not self._finished or (self._connections() and time.monotonic() < self._deadline)):
            for key, _ in self._selector.select(BEAT_SECONDS / 4):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            for connection in self._connections():
                self._guarded(connection, connection.beat)
            self._advance()
        for connection in self._connections():
            connection.close()
        self._listener.close()

    def _connections(self) -> list[Connection]:
        return [*self._strangers, *(node.connection for node in self._nodes if node.connection)]

    def _accept(self) -> None:
        accepted, _ = self._listener.accept()
        connection = Connection(accepted, self.job.lost_seconds)
        self._strangers.append(connection)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def _read(self, connection: Connection) -> None:
        for message in self._guarded(connection, connection.receive) or ():
            self._guarded(connection, self._handle, connection, message)

    def _handle(self, connection: Connection, message: Message) -> None:
        kind = message["kind"]
        node = next((node for node in self._nodes if node.connection is connection), None)
        try:
            if kind == "join":
                self._join(connection, message)
            elif node is None:
                raise ConnectionLostError("it has not joined")
            elif kind == "done":
                node.code = message["code"]
            elif kind == "failed" and self._running:
                self._fail(_Cause(message["severity"], message["text"], message["code"]))
            elif kind == "stop":
                self._stopping = True
                self._tell_all("stop")
        except (KeyError, TypeError):
            raise ConnectionLostError("it sent something that is not a message") from None

    def _guarded(self, connection: Connection, action: Callable[..., Any], *arguments: Any, **values: Any) -> Any:
        """What `action` returns; None after it lost the connection, which is then forgotten."""
        try:
            return action(*arguments, **values)
        except ConnectionLostError as error:
            self._forget(connection, str(error))
            return None

    def _forget(self, connection: Connection, why: str) -> None:
        if connection.socket.fileno() < 0:
            return  # closed while its last messages were still being read
        self._selector.unregister(connection.socket)
        connection.close()
        if connection in self._strangers:
            self._strangers.remove(connection)
        for rank, node in enumerate(self._nodes):
            if node.connection is connection:
                node.connection, node.joined = None, False
                if self._running and node.code is None:
                    ranks = self.job.describe_ranks(rank)
                    self._fail(_Cause(LOST_NODE, f"node {rank} ({node.host}) is lost: {why}; it held {ranks}", 1))

    def _fail(self, cause: _Cause) -> None:
        if not self._causes:
            self._deadline = time.monotonic() + SETTLE_SECONDS
        self._causes.append(cause)

    def _join(self, connection: Connection, message: Message) -> None:
        rank, host = message["node"], message["host"]
        if message["digest"] != self.job.digest or not 0 <= rank < self.job.nnodes:
            text = f"node {rank} ({host}) was started with another command than node 0"
            connection.send("abort", text=text, code=REFUSED, restart=False)
            return
        node = self._nodes[rank]
        if node.connection is not None and node.connection is not connection:
            self._forget(node.connection, "it was started again")
        if connection in self._strangers:
            self._strangers.remove(connection)
        node.connection, node.host, node.devices = connection, host, message["devices"]
        node.joined, node.code = True, None
        self._resume = self._resume or message["started"]

    def _advance(self) -> None:
        now = time.monotonic()
        if self._finished:
            return
        if not self._running:
            if all(node.joined for node in self._nodes):
                self._start()
            elif now > self._deadline:
                missing = [f"{rank} ({node.host})" for rank, node in enumerate(self._nodes) if not node.joined]
                text = f"node {', '.join(missing)} did not join within {self.job.join_seconds:g} s"
                self._abort(_Cause(LOST_NODE, text, 1), restart=False)
        elif self._causes:
            if now > self._deadline and not self._somebody_may_be_lost():
                cause = max(self._causes)
                final = self._stopping or cause.code == REFUSED or self._attempt >= self.job.max_restarts
                self._abort(cause, restart=not final)
        elif all(node.code is not None for node in self._nodes):
            self._tell_all("finish", code=max(node.code or 0 for node in self._nodes))
            self._finished, self._deadline = True, now + CLOSING_SECONDS

    def _somebody_may_be_lost(self) -> bool:
        """Whether a node has missed beats but not enough to be called lost: then the cause is not known yet."""
        return any(node.connection and node.connection.silent > 3 * BEAT_SECONDS for node in self._nodes)

    def _start(self) -> None:
        self._running, self._causes = True, []
        for node in self._nodes:
            node.joined = False
        address = self._own_address()
        with socket.create_server(("", 0)) as probe:
            port = probe.getsockname()[1]
        servers = [{"address": self._address_of(node), "devices": node.devices} for node in self._nodes]
        start = {"attempt": self._attempt, "resume": self._resume, "address": address, "port": port}
        self._tell_all("start", **start, servers=servers)

    def _own_address(self) -> str:
        """Where the other nodes reached this one, which behind a Kubernetes service is not where they called it."""
        others = [node.connection for node in self._nodes[1:] if node.connection]
        return others[0].socket.getsockname()[0] if others else "127.0.0.1"

    def _address_of(self, node: _Node) -> str:
        if node is self._nodes[0] or node.connection is None:
            return self._own_address()
        return node.connection.socket.getpeername()[0]

    def _abort(self, cause: _Cause, restart: bool) -> None:
        self._tell_all("abort", text=cause.text, code=cause.code, restart=restart)
        self._running, self._causes, self._finished = False, [], not restart
        self._attempt += 1
        self._deadline = time.monotonic() + (self.job.join_seconds if restart else CLOSING_SECONDS)

    def _tell_all(self, kind: str, **values: Any) -> None:
        for node in self._nodes:
            if node.connection is not None:
                self._guarded(node.connection, node.connection.send, kind, **values)
