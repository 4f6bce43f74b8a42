"""Processes that end when they should, and not when somebody stops reading."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def die_with_parent(death_signal: signal.Signals) -> None:
    """Have this process receive `death_signal` when the process that started it ends, however it ends. Linux only."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(death_signal))  # PR_SET_PDEATHSIG, which survives exec
        if os.getppid() != parent:
            os.kill(os.getpid(), death_signal)


@contextmanager
def output_nobody_needs_to_read() -> Iterator[None]:
    """Inside, what this process and its children write to stdout and stderr goes to stdout as long as that is open.

    A broken pipe, as when an ssh connection ends, would otherwise kill whoever writes next.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    reading, writing = os.pipe()
    for descriptor in (1, 2):
        os.dup2(writing, descriptor)
    os.close(writing)
    copier = threading.Thread(target=_copy, args=(reading, kept[0]), daemon=True)
    copier.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
        copier.join(timeout=5)


def _copy(reading: int, writing: int) -> None:
    is_open = True
    while data := os.read(reading, 65536):
        try:
            while is_open and data:
                data = data[os.write(writing, data) :]
        except OSError:
            is_open = False
