"""Memory in use, in bytes."""

from pathlib import Path

import torch


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the allocator on an accelerator, of the process's resident set on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return _peak_resident_set()
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return _peak_resident_set()


def _peak_resident_set() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
