"""The supervisors' meeting, without workers: who is called the cause, who is lost, who may start."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from pangu.launch import Job, meeting
from pangu.launch.meeting import FAILED, KILLED, LOST_PEER, ConnectionLostError, Coordinator, Member, Message

Meet = Callable[..., tuple[Coordinator, list["Supervisor"]]]


class Supervisor:
    """A member that reads in the background, as a real one does all the time."""

    def __init__(self, port: int, job: Job, node: int, heard: Sequence[Message] = ()) -> None:
        """`heard`: what this supervisor has heard from a coordinator that is no more."""
        self.member = Member.connect("127.0.0.1", port, job.lost_seconds)
        self.job, self.node = job, node
        self.messages: list[Message] = []  # not yet taken by `next`
        self.heard = list(heard)
        self.lost = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.join()
        self._thread.start()

    def join(self) -> None:
        self.member.send(
            "join",
            node=self.node,
            host=f"host{self.node}",
            digest=self.job.digest,
            devices=[],
            started=any(message["kind"] == "start" for message in self.heard),
        )

    def _read(self) -> None:
        try:
            while not self._end.is_set():
                message = self.member.receive(0.05)
                if message:
                    self.messages.append(message)
                    self.heard.append(message)
        except ConnectionLostError as error:
            self.lost = str(error)

    def next(self, kind: str) -> dict[str, Any]:
        """The first message of a kind, which is taken away."""
        deadline = time.monotonic() + 30
        while True:
            for message in self.messages:
                if message["kind"] == kind:
                    self.messages.remove(message)
                    return message
            assert time.monotonic() < deadline, f"node {self.node} has no {kind!r} among {self.messages} {self.lost}"
            time.sleep(0.02)

    def fall_silent(self) -> None:
        """As when the link is cut: nothing is closed, and nothing more is said."""
        self._end.set()
        self._thread.join()

    def close(self) -> None:
        self.fall_silent()
        self.member.close()


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meet]:
    monkeypatch.setattr(meeting, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(meeting, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(meeting, "CLOSING_SECONDS", 0.5)
    with ExitStack() as stack:

        def start(nnodes: int, **fields: Any) -> tuple[Coordinator, list[Supervisor]]:
            port = 0 if nnodes == 1 else _free_port()
            options = {"lost_seconds": 5.0, "join_seconds": 30.0, **fields}
            job = Job(command=("train", "debug"), nproc=2, nnodes=nnodes, master_port=port, **options)
            coordinator = Coordinator(job)
            stack.callback(coordinator.close, at_once=True)
            members = [Supervisor(coordinator.port, job, node) for node in range(nnodes)]
            for member in members:
                stack.callback(member.close)
            return coordinator, members

        yield start


def _read_on(member: Member) -> None:
    while True:
        member.receive(0.1)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_all_start_together_and_finish_together(meet: Meet) -> None:
    _, nodes = meet(3)
    starts = [node.next("start") for node in nodes]
    assert starts[0] == starts[1] == starts[2]
    assert (starts[0]["attempt"], starts[0]["resume"]) == (0, False)
    assert len(starts[0]["servers"]) == 3
    for node in nodes[:2]:
        node.member.send("done", code=0)
    time.sleep(0.5)
    assert not any(node.messages for node in nodes), "node 2 is not done"
    nodes[2].member.send("done", code=130)
    assert [node.next("finish")["code"] for node in nodes] == [130] * 3


def test_a_closed_connection_is_a_lost_node(meet: Meet) -> None:
    _, nodes = meet(2)
    nodes[0].next("start")
    nodes[1].close()
    verdict = nodes[0].next("abort")
    assert verdict["text"] == "node 1 (host1) is lost: its connection was closed; it held rank 2, rank 3"
    assert (verdict["code"], verdict["restart"]) == (1, False)


def test_silence_is_a_lost_node_on_both_ends(meet: Meet) -> None:
    coordinator, nodes = meet(2, lost_seconds=1.0)
    nodes[0].next("start")
    nodes[1].fall_silent()
    assert "node 1 (host1) is lost: no sign of life for 1 s" in nodes[0].next("abort")["text"]
    coordinator.close(at_once=True)
    with pytest.raises(ConnectionLostError):
        _read_on(nodes[1].member)


def test_the_cause_is_named_not_what_follows_from_it(meet: Meet) -> None:
    _, nodes = meet(2)
    nodes[0].next("start")
    nodes[0].member.send("failed", text="a peer was lost", code=1, severity=LOST_PEER)
    nodes[1].member.send("failed", text="an exception", code=1, severity=FAILED)
    nodes[0].member.send("failed", text="killed", code=1, severity=KILLED)
    assert [node.next("abort")["text"] for node in nodes] == ["killed", "killed"]


def test_a_silent_node_is_waited_for_before_a_cause_is_named(meet: Meet) -> None:
    """Workers on the near side of a cut link report a lost peer long before the far side counts as lost."""
    _, nodes = meet(2, lost_seconds=3.0)
    nodes[0].next("start")
    nodes[1].fall_silent()
    time.sleep(1.0)
    nodes[0].member.send("failed", text="a peer was lost", code=1, severity=LOST_PEER)
    assert "node 1 (host1) is lost" in nodes[0].next("abort")["text"]


def test_restarts_are_counted_and_need_all_nodes(meet: Meet) -> None:
    coordinator, nodes = meet(2, max_restarts=1)
    nodes[0].next("start")
    nodes[1].close()
    assert nodes[0].next("abort")["restart"] is True
    nodes[0].join()
    time.sleep(0.5)
    assert not nodes[0].messages, "node 1 is not back"
    back = Supervisor(coordinator.port, nodes[0].job, 1)
    assert nodes[0].next("start")["attempt"] == back.next("start")["attempt"] == 1
    back.close()
    assert nodes[0].next("abort")["restart"] is False


def test_a_new_coordinator_goes_on_from_what_others_have_trained(meet: Meet) -> None:
    """Node 0 was killed and started again, without --resume perhaps; node 1 has started workers before."""
    coordinator, nodes = meet(2)
    nodes[1].next("start")
    coordinator.close(at_once=True)
    again = Coordinator(nodes[1].job)
    try:
        fresh, other = Supervisor(again.port, nodes[0].job, 0), Supervisor(again.port, nodes[1].job, 1, nodes[1].heard)
        for node in (fresh, other):
            assert (start := node.next("start"))["resume"] is True
            assert start["attempt"] == 0
            node.close()
    finally:
        again.close(at_once=True)


def test_a_node_that_comes_back_before_it_was_missed_is_a_lost_node(meet: Meet) -> None:
    coordinator, nodes = meet(2, max_restarts=1)
    nodes[0].next("start")
    nodes[1].fall_silent()
    back = Supervisor(coordinator.port, nodes[0].job, 1)
    assert "node 1 (host1) is lost: it was started again" in nodes[0].next("abort")["text"]
    nodes[0].join()
    assert nodes[0].next("start")["attempt"] == back.next("start")["attempt"] == 1
    back.close()


def test_refused_input_is_not_tried_again(meet: Meet) -> None:
    _, nodes = meet(1, max_restarts=3)
    nodes[0].next("start")
    nodes[0].member.send("failed", text="no such field", code=2, severity=FAILED)
    verdict = nodes[0].next("abort")
    assert (verdict["restart"], verdict["code"]) == (False, 2)


def test_one_signal_stops_every_node_and_nothing_is_started_again(meet: Meet) -> None:
    _, nodes = meet(2, max_restarts=3)
    nodes[0].next("start")
    nodes[1].member.send("stop")
    for node in nodes:
        node.next("stop")
    nodes[1].member.send("failed", text="could not save", code=1, severity=FAILED)
    assert nodes[0].next("abort")["restart"] is False


def test_nodes_that_do_not_come_are_named(meet: Meet) -> None:
    job = Job(command=("train", "debug"), nproc=1, nnodes=3, master_port=_free_port(), join_seconds=1.0)
    coordinator = Coordinator(job)
    there = Supervisor(coordinator.port, job, 1)
    assert there.next("abort")["text"] == "node 0 (never seen), 2 (never seen) did not join within 1 s"
    there.close()
    coordinator.close()


def test_another_command_is_refused_and_strangers_do_no_harm(meet: Meet) -> None:
    coordinator, nodes = meet(2)
    for node in nodes:
        node.next("start")
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b'{"kind": "join"}\n', b"[]\n", b'{"kind": "failed"}\n'):
        with socket.create_connection(("127.0.0.1", coordinator.port)) as stranger:
            stranger.sendall(garbage)
            stranger.settimeout(10)
            while stranger.recv(1024):  # signs of life, until the coordinator closes
                pass
    other = Job(command=("train", "quickstart"), nproc=2, nnodes=2, master_port=coordinator.port)
    guest = Supervisor(coordinator.port, other, 1)
    verdict = guest.next("abort")
    assert verdict["text"] == "node 1 (host1) was started with another command than node 0"
    assert verdict["code"] == 2
    guest.close()
    assert not any(node.messages or node.lost for node in nodes)
