"""Processes that end when they should."""

import ctypes
import os
import signal
import sys


def die_with_parent(death_signal: signal.Signals) -> None:
    """Have this process receive `death_signal` when the process that started it ends, however it ends. Linux only."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(death_signal))  # PR_SET_PDEATHSIG, which survives exec
        if os.getppid() != parent:
            os.kill(os.getpid(), death_signal)
