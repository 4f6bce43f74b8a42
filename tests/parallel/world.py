"""A world of processes that tests share: starting one takes seconds, a check in it takes milliseconds."""

import functools
import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from pangu.device.cann_emulator import install


class World:
    """`size` processes, started when first needed, each with torch.distributed initialized while it runs a function.

    Every function begins with fresh process groups: each group of gloo has threads that never rest, and a hundred tests
    with ten groups each would leave the processor with nothing else to do. A function that fails on one rank leaves the
    others waiting in collectives; they are freed by the end of the failed rank's connections.
    """

    def __init__(self, size: int, device: str = "cpu", timeout: float = 120.0) -> None:
        """device is cpu, with gloo, or npu: an emulated one for each rank, with hccl.

        timeout, in seconds, is of a collective; a function may take twice as long.
        """
        self.size = size
        self.device = device
        self.timeout = timeout
        self._folder = tempfile.TemporaryDirectory()
        self._ranks: list[tuple[Any, Connection]] = []
        self._generation = 0

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on every rank, in their order, from the seed 0.

        The function, arguments and results are pickled: functions of a module, tensors on the CPU. Raises
        AssertionError with the traceback of each rank on which the function failed or that died or hung.
        """
        self._start()
        self._generation += 1
        for _, pipe in self._ranks:
            pipe.send((self._generation, function, args))
        answers = [self._answer(rank) for rank in range(self.size)]
        failures = [f"rank {rank}:\n{text}" for rank, (succeeded, text) in enumerate(answers) if not succeeded]
        if failures:
            if any(process.exitcode is not None for process, _ in self._ranks):
                self.close()
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    def close(self) -> None:
        """End the processes. The next `run` starts new ones."""
        for process, pipe in self._ranks:
            if process.is_alive():
                pipe.send(None)
        for process, pipe in self._ranks:
            process.join(timeout=10)
            process.kill()
            process.join()
            pipe.close()
        self._ranks.clear()

    def _start(self) -> None:
        if self._ranks:
            return
        context = get_context("spawn")
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.size):
            pipe, remote_pipe = context.Pipe()
            arguments = (rank, self.size, self.device, self.timeout, store, remote_pipe)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            remote_pipe.close()  # so that its end is noticed here
            self._ranks.append((process, pipe))

    def _answer(self, rank: int) -> tuple[bool, Any]:
        process, pipe = self._ranks[rank]
        if not pipe.poll(2 * self.timeout):
            process.kill()
            process.join()
            return False, f"no answer after {2 * self.timeout} s"
        try:
            answer: tuple[bool, Any] = pipe.recv()
            return answer
        except (EOFError, ConnectionResetError):
            process.join()
            return False, f"the process died with exit code {process.exitcode}"


def _serve(rank: int, size: int, device: str, timeout: float, store: str, pipe: Connection) -> None:
    backend = "gloo"
    if device == "npu":
        install(asynchronous=True)
        torch.get_device_module("npu").set_device(rank)
        backend = "cpu:gloo,npu:hccl"
    caches: list[Any] = []
    while (task := pipe.recv()) is not None:
        generation, function, args = task
        if not caches:
            caches = _caches()
            gc.freeze()  # what has been imported by now is looked through no more
        _destroy_groups(caches)
        prefixed = dist.PrefixStore(str(generation), dist.FileStore(store, size))
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            _destroy_groups(caches)
            pipe.send((False, traceback.format_exc()))
    _destroy_groups(caches)
    os._exit(0)  # taking the interpreter and torch down takes seconds


def _caches() -> list[Any]:
    """Of functions of torch.distributed, which keep process groups alive."""
    caches = [each for each in gc.get_objects() if isinstance(each, functools._lru_cache_wrapper)]
    return [cache for cache in caches if str(cache.__module__).startswith("torch.distributed")]


def _destroy_groups(caches: list[Any]) -> None:
    """Also what holds them: DTensor's caches hold meshes, modules are in cycles."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _clear_sharding_prop_cache()
    clear_redistribute_planner_cache()
    gc.collect()
    for cache in (*caches, *_caches()):
        cache.cache_clear()
    gc.collect()
