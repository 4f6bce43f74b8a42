"""What PyTorch's flight recorders remember of the collectives of this process."""

import importlib
import pickle
from typing import Any

import torch

_RECORDERS = {
    "cpu": ("torch._C._distributed_c10d", "_dump_fr_trace"),
    "cuda": ("torch._C._distributed_c10d", "_dump_nccl_trace"),
    "npu": ("torch_npu._C._distributed_c10d", "_dump_hccl_trace"),
}


def recorded_collectives(device: torch.device, *, frames: bool = False) -> list[dict[str, Any]]:
    """The last collectives that this process entered on the CPU and on `device`, oldest first.

    Among an entry's keys are `profiling_name`, `process_group`, `collective_seq_id`, `time_created_ns`, `input_sizes`,
    `state` and `retired`: it has ended when either says so. With `frames`, whose first call takes a second or two,
    there is also `frames`, its Python stack. gloo's recorder leaves point-to-point messages out; HCCL's records nothing
    unless TORCH_HCCL_TRACE_BUFFER_SIZE is set, and on the emulated CANN no names.
    """
    entries: list[dict[str, Any]] = []
    for kind in {"cpu", device.type}:
        module, function = _RECORDERS[kind]
        dump = getattr(importlib.import_module(module), function, None)
        if dump is not None:
            entries += pickle.loads(dump(includeCollectives=True, includeStackTraces=frames)).get("entries", [])
    return sorted(entries, key=lambda entry: entry["time_created_ns"])
