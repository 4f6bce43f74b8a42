"""The processes of a run, and their groups along every dimension of the layout."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pangu import device
from pangu.config import ParallelConfig
from pangu.errors import ConfigError
from pangu.parallel.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """This process's place in a layout.

    state: the mesh of parameters and optimizer state, with dimensions (pp, dp_replicate, fsdp, tp). Parameters are
        sharded over fsdp = dp_shard x cp: ranks that see other tokens of the same documents average gradients with
        those that see other documents.
    """

    layout: Layout
    rank: int
    state: DeviceMesh
    cp_group: dist.ProcessGroup | None

    @property
    def coordinates(self) -> dict[str, int]:
        return self.layout.coordinates(self.rank)

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.state.get_group("tp")

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.state.get_group("pp")

    @property
    def fsdp_size(self) -> int:
        """Ranks over which parameters are sharded."""
        return self.layout.dp_shard * self.layout.cp

    @property
    def gradient_ranks(self) -> int:
        """Ranks over which FSDP averages gradients."""
        return self.layout.dp_replicate * self.fsdp_size


def environment_rank() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun sets them in the environment; (0, 1, 0) without it.

    Raises `ConfigError` for values that are not numbers or do not fit.
    """
    values = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise ConfigError(
                f"environment variable {name}={text!r} is not a number; start processes with pangu launch"
            )
        values.append(int(text))
    rank, world_size, local_rank = values
    if rank >= world_size:
        raise ConfigError(f"environment: RANK {rank} is not below WORLD_SIZE {world_size}")
    return rank, world_size, local_rank


@contextmanager
def connected(target: torch.device, parallel: ParallelConfig, world_size: int) -> Iterator[None]:
    """Inside, this process is in the default process group, on the collective backend of `target`.

    One that is there already is used and left; a single process needs none. Tensors on the CPU travel over gloo
    whatever the device: control messages need no accelerator.
    """
    if world_size == 1 or dist.is_initialized():
        yield
        return
    backend = device.collective_backend(target)
    dist.init_process_group(
        backend if target.type == "cpu" else f"cpu:gloo,{target.type}:{backend}",
        timeout=timedelta(seconds=parallel.timeout_seconds),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_mesh(layout: Layout, device_type: str) -> Mesh:
    """The groups of the default process group's ranks in `layout`. Every rank calls it."""
    state = init_device_mesh(
        device_type,
        (layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp, layout.tp),
        mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"),
    )
    cp_group = None
    if layout.cp > 1:
        cp_group, _ = dist.new_subgroups_by_enumeration(list(layout.groups("cp")))
    return Mesh(layout, dist.get_rank(), state, cp_group)
