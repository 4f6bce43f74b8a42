"""Steps that take too long, and the rank that is to blame.

A thread of every rank watches the step in progress. When it exceeds `train.hang_seconds`, the rank writes the Python
stacks of all its threads and its collectives to RUN/hangs/step_N/rank_R.txt, and one rank says on the console which
rank is the slowest. The ranks tell one another what they do through torch.distributed's store, which works when
collectives do not. Nothing is ended: that is for parallel.timeout_seconds, or for a person.
"""

import json
import linecache
import os
import re
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from pangu.device import recorded_collectives
from pangu.parallel.layout import Layout

SAMPLE_SECONDS = 0.05
BEAT_SECONDS = 1.0
SILENT_SECONDS = 5.0
"""A rank whose beat does not change for so long is silent: stopped, dead or cut off."""

_WAIT = re.compile(r"\.wait\(|wait_tensor\(")
_TORCH = os.path.dirname(torch.__file__)


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int
    """Grows by one each time."""
    step: int
    """The step in progress, or the last one."""
    inside: bool
    """Whether a step is in progress, rather than a checkpoint or a validation."""
    hung: bool
    """Whether that step has exceeded the bound."""
    where: str
    """File, line and function of the training thread."""
    waiting: str
    """The collective it waits in, empty if in none."""
    waiting_seconds: float = 0.0


class Watchdog:
    """A context manager around the training loop of one rank; `step` is to be entered around every step."""

    def __init__(
        self, folder: Path, hang_seconds: float, layout: Layout, rank: int, device: torch.device | None = None
    ) -> None:
        """folder: for the ranks' files. hang_seconds: 0 for no bound; busy time is measured all the same."""
        self.folder = folder
        self.hang_seconds = hang_seconds
        self.layout = layout
        self.rank = rank
        self.device = device or torch.device("cpu")
        self.busy_seconds = 0.0
        """Of the last step: its time less what this rank was seen waiting for others, to `SAMPLE_SECONDS`."""
        self._watched = threading.get_ident()
        self._store: dist.Store | None = None
        if layout.world_size > 1 and hang_seconds:
            # A connection of its own: the training thread may hold the other one while it waits.
            self._store = _get_default_store().clone()  # type: ignore[attr-defined]
        self._step = -1
        self._started: float | None = None
        self._samples = self._waits = 0
        self._beats = 0
        self._reported = -1  # the last step that was reported as hung
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.hang_seconds or self.layout.world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=SILENT_SECONDS)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch what is done inside as step `number`, in the thread that made the watchdog."""
        self._samples = self._waits = 0
        self._step, self._started = number, time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - self._started
            self._started = None
            self.busy_seconds = seconds * (1 - self._waits / (self._samples + 1))

    def _watch(self) -> None:
        beaten = 0.0
        while not self._end.wait(SAMPLE_SECONDS):
            if self._started is not None:
                self._samples += 1
                self._waits += _waits(sys._current_frames().get(self._watched))
            if not self.hang_seconds:
                continue
            try:
                if self._hung and self._reported < self._step:
                    self._reported = self._step
                    self._report(self._step)
                elif time.monotonic() - beaten > BEAT_SECONDS:
                    beaten = time.monotonic()
                    self._beat()
            except (dist.DistError, OSError) as error:
                self._say(f"rank {self.rank}: the watchdog ends: {error}")
                return

    @property
    def _hung(self) -> bool:
        started = self._started
        return started is not None and time.monotonic() - started > self.hang_seconds

    def _beat(self) -> None:
        """Tell the others what this rank does."""
        if self._store is None:
            return
        frame = sys._current_frames().get(self._watched)
        in_flight = _in_flight(recorded_collectives(self.device)) if self._hung else []
        self._beats += 1
        beat = Beat(
            number=self._beats,
            step=self._step,
            inside=self._started is not None,
            hung=self._hung,
            where=_where(frame),
            waiting=_name(in_flight[0]) if in_flight else "a message" if _waits(frame) else "",
            waiting_seconds=_age(in_flight[0]) if in_flight else 0.0,
        )
        self._store.set(_key(self.rank), json.dumps(asdict(beat)))

    def _keep_beating(self) -> None:
        for _ in range(round(SILENT_SECONDS / BEAT_SECONDS)):
            self._beat()
            self._end.wait(BEAT_SECONDS)

    def _report(self, step: int) -> None:
        self._beat()
        folder = self.folder / f"step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{self.rank}.txt").write_text("\n".join(self._describe(step)) + "\n")
        if self._store is None:
            self._say(f"step {step} has taken more than {self.hang_seconds:g} s; stacks are in {folder}")
            return
        if self.rank:
            self._keep_beating()  # so that a lower rank may find out, too, and judge
        if not any((beat := self._read(rank)) and beat.hung and beat.step == step for rank in range(self.rank)):
            self._judge(step, folder)

    def _judge(self, step: int, folder: Path) -> None:
        before = [self._read(rank) for rank in range(self.layout.world_size)]
        self._keep_beating()
        after = [self._read(rank) for rank in range(self.layout.world_size)]
        rank, why = slowest(before, after)
        others = [beat.waiting for other, beat in enumerate(after) if beat and beat.waiting and other != rank]
        waiting = f"; {len(others)} of the others wait in {max(set(others), key=others.count)}" if others else ""
        self._say(
            f"step {step} has taken more than {self.hang_seconds:g} s. Slowest: {self._name(rank)}, {why}{waiting}. "
            f"Stacks and collectives of every rank: {folder}"
        )

    def _read(self, rank: int) -> Beat | None:
        assert self._store is not None
        if not self._store.check([_key(rank)]):
            return None
        return Beat(**json.loads(self._store.get(_key(rank))))

    def _describe(self, step: int) -> Iterator[str]:
        entries = recorded_collectives(self.device, frames=True)
        yield f"{self._name(self.rank)} on {socket.gethostname()}, process {os.getpid()}"
        yield f"step {step} has taken more than {self.hang_seconds:g} s"
        in_flight = _in_flight(entries)
        yield "\nCollectives in flight:" if in_flight else "\nNo collective is in flight."
        yield from map(_describe_entry, in_flight)
        if entries:
            yield "\nThe last collective that was entered:"
            yield _describe_entry(entries[-1])
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for identity, frame in sys._current_frames().items():
            yield f"\nThread {names.get(identity, identity)}{', which trains' if identity == self._watched else ''}:"
            yield "".join(traceback.format_stack(frame)).rstrip()

    def _name(self, rank: int) -> str:
        where = ", ".join(f"{name} {index}" for name, index in self.layout.coordinates(rank).items())
        return f"rank {rank} ({where})"

    def _say(self, text: str) -> None:
        print(f"pangu: {text}", file=sys.stderr, flush=True)


def slowest(before: Sequence[Beat | None], after: Sequence[Beat | None]) -> tuple[int, str]:
    """The rank to blame, and why, by what all ranks said some seconds ago and now.

    In this order: one that says nothing any more, one that is in an earlier step, one that waits for nobody, and if all
    wait for one another, the one that has waited longest.
    """

    def key(rank: int) -> tuple[bool, int, bool, float]:
        first, last = before[rank], after[rank]
        if last is None or (first is not None and first.number == last.number):
            return False, -1, False, 0.0
        return True, last.step, bool(last.waiting), -last.waiting_seconds

    rank = min(range(len(after)), key=key)
    beat, (speaks, *_) = after[rank], key(rank)
    if beat is None:
        return rank, "which has said nothing since training began"
    if not speaks:
        return rank, f"which says nothing any more; it was last seen in step {beat.step} at {beat.where}"
    doing = f"in {beat.waiting}" if beat.waiting else "which waits for nobody"
    return rank, f"{doing}, in step {beat.step}{'' if beat.inside else ' (after it)'} at {beat.where}"


def spread(busy_seconds: float, device: torch.device | None = None) -> dict[str, Any]:
    """Compare the ranks' `Watchdog.busy_seconds` of a step; every rank calls it, with the device it communicates from.

    Returns `busy_seconds`, the median; `busy_spread`, the largest over the median; `slowest_rank`. A step's own time
    would not do: ranks wait for one another, so that it is the same for all of them.
    """
    mine = torch.tensor([busy_seconds], dtype=torch.float32, device=device)
    everyone = torch.empty(dist.get_world_size(), dtype=torch.float32, device=device)
    dist.all_gather_single(everyone, mine)
    seconds = everyone.tolist()
    median = statistics.median(seconds)
    return {
        "busy_seconds": median,
        "busy_spread": max(seconds) / median,
        "slowest_rank": seconds.index(max(seconds)),
    }


def _key(rank: int) -> str:
    return f"pangu/watchdog/{rank}"


def _waits(frame: FrameType | None) -> bool:
    """Whether a thread is on a line that waits for a collective. Waiting for data shows as threading's own lines."""
    return frame is not None and bool(_WAIT.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno)))


def _where(frame: FrameType | None) -> str:
    """The innermost line that is not torch's own."""
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _in_flight(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if not entry["retired"] and entry["state"] != "completed"]


def _name(entry: dict[str, Any]) -> str:
    group = entry["process_group"][1] or entry["process_group"][0]
    return f"{entry['profiling_name'] or 'a collective'} of {group}, its number {entry['collective_seq_id']}"


def _age(entry: dict[str, Any]) -> float:
    return time.time() - entry["time_created_ns"] / 1e9


def _describe_entry(entry: dict[str, Any]) -> str:
    frames = [frame for frame in entry["frames"] if not frame["filename"].startswith(_TORCH)]
    at = f", at {frames[0]['filename']}:{frames[0]['line']} in {frames[0]['name']}" if frames else ""
    return f"  {_name(entry)}, entered {_age(entry):.1f} s ago, of {entry['input_sizes']} {entry['input_dtypes']}{at}"
