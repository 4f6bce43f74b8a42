"""A process of `pangu doctor --deep`: measures, and appends what it finds to a file, line by line.

Processes of their own, so that an operator that brings its process down costs the rest of one part, not the report.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from pangu import config as configuration
from pangu.errors import PanguError

_TIMEOUT = timedelta(seconds=120)


@dataclasses.dataclass(frozen=True)
class Task:
    """config: plain, as TOML has it. store: where processes find one another. output: JSON lines go there."""

    part: Literal["alone", "together"]
    config: dict[str, Any]
    device: str
    emulate: bool
    rank: int
    world_size: int
    store: str
    output: str


class Writer:
    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def __call__(self, part: str, results: Iterable[Any]) -> None:
        """A line per result as it comes: what is there when a process dies stays."""
        with self.path.open("a", encoding="utf-8") as file:
            for result in results:
                record = result if isinstance(result, dict) else dataclasses.asdict(result)
                print(json.dumps({"part": part, **record}), file=file, flush=True)


def run(task: Task) -> None:
    config = configuration.from_tree(task.config, "the config")
    if task.emulate:
        from pangu.device import cann_emulator, environment

        environment.apply(config, leave=("TASK_QUEUE_ENABLE",))
        cann_emulator.install()
    elif task.device == "npu":
        from pangu.device import environment

        environment.apply(config)
    from pangu import device

    target = device.select(task.device, task.rank)
    write = Writer(task.output)
    if task.part == "alone":
        _alone(task, config, target, write)
    else:
        _together(task, config, target, write)


def _alone(task: Task, config: configuration.Config, target: Any, write: Writer) -> None:
    import torch

    from pangu.doctor import parity, rates, training

    exact, scale = task.emulate or target.type == "cpu", rates.scale_of(target, task.emulate)
    name = torch.get_device_module(target).get_device_name(target) if target.type != "cpu" else ""
    memory = torch.get_device_module(target).mem_get_info(target)[1] if target.type != "cpu" else 0
    write("device", [{"name": name, "memory_bytes": memory, "threads": torch.get_num_threads()}])
    write("operator", parity.compare(config.model, target, exact=exact))
    write("matmul", rates.matmuls(config, target, scale))
    write("memory", [rates.memory(target, scale)])
    write("training", [training.compare(config, task.device, exact=exact)])


def _together(task: Task, config: configuration.Config, target: Any, write: Writer) -> None:
    import torch.distributed as dist

    from pangu import device
    from pangu.doctor import collectives, rates

    backend = device.collective_backend(target)
    dist.init_process_group(
        backend if target.type == "cpu" else f"cpu:gloo,{target.type}:{backend}",
        store=dist.FileStore(task.store, task.world_size),
        rank=task.rank,
        world_size=task.world_size,
        timeout=_TIMEOUT,
    )
    write("exchange", collectives.measure(config.parallel, target, rates.scale_of(target, task.emulate)))
    differences = collectives.check_overlap(target)
    write("overlap", [{"operator": name, "difference": value} for name, value in differences.items()])
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    task = Task(**json.loads(sys.argv[1]))
    try:
        run(task)
    except PanguError as error:
        Writer(task.output)("error", [{"message": str(error)}])
        return 2
    return 0


if __name__ == "__main__":
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    raise SystemExit(main())
