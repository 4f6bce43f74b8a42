"""What can be refused before a device is touched: `pangu train --check`."""

import math

from pangu.config import Config
from pangu.data.loader import Loader
from pangu.data.schedule import Schedule
from pangu.parallel.layout import make_layout


def check(config: Config, world_size: int | None = None) -> list[str]:
    """Lines that describe the run of `config` on `world_size` ranks, by default as few as its layout needs.

    Raises what `train` would raise for the layout and the data, on this process alone and without a device.
    """
    parallel = config.parallel
    if world_size is None:
        sizes = parallel.pp, parallel.dp_replicate, max(parallel.dp_shard, 1), parallel.cp, parallel.tp
        world_size = math.prod(sizes)
    layout, schedule = make_layout(config, world_size), Schedule(config)
    Loader(config, schedule, dp_rank=0, dp_size=layout.dp)
    batch_sizes = sorted({stretch.batch_size for stretch in schedule.stretches()})
    micro_batches = sorted({size // (config.train.micro_batch_size * layout.dp) for size in batch_sizes})
    return [
        f"{world_size} ranks, {schedule.total_steps:,} steps of {_listed(batch_sizes)} sequences, "
        f"{_listed(micro_batches)} micro-batches per rank and step",
        *layout.describe(),
    ]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
