"""Checkpoints on torch.distributed.checkpoint (DCP): asynchronous, atomic, verified, reshardable.

    FOLDER/step_00000100/__0_0.distcp ...   every rank's shards, and DCP's .metadata with each tensor's global shape
                         metadata.json      step, version of pangu, and what the caller adds (config, layout)
                         checksums.json     size and SHA-256 of every other file

A checkpoint is written under a hidden temporary name, flushed to the disk and published by one rename: kill -9 leaves
a complete checkpoint or a temporary folder that the next run removes. FOLDER must be visible to every rank.
"""

import copy
import errno
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from pangu import __version__
from pangu.config import CheckpointConfig
from pangu.errors import CheckpointError
from pangu.files import sync, write_atomically

logger = logging.getLogger(__name__)

# DCP warns at every use without a process group, which is an ordinary case here. `warnings.catch_warnings` around
# the calls would not do: it changes the whole process's filters, and saving happens in a thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

T = TypeVar("T")

_DCP_METADATA = ".metadata"
_METADATA = "metadata.json"
_CHECKSUMS = "checksums.json"
_HASH_BLOCK = 1 << 20
_SLACK_BYTES = 1 << 20  # DCP's metadata, the JSON files and the headers of tensors


class Checkpointer:
    """Saves and loads the checkpoints of one run. Every rank makes one, and calls its methods in the same order."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        """Creates `folder` and removes what a killed run left half-written in it."""
        self.folder = folder
        self.config = config
        # A group of its own: the collectives of a save in the background must not mix with those of training.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._save_in_flight: Future[None] | None = None
        self._staging: dict[tuple[str, ...], Tensor] = {}
        self._damaged: set[int] = set()
        _on_rank_0(self._prepare_folder, self.group)

    def save(
        self, step: int, state: dict[str, Any], metadata: dict[str, Any], *, asynchronous: bool | None = None
    ) -> None:
        """Save `state` as the checkpoint of `step`, which replaces one of the same step.

        `state` is nested dictionaries whose leaves are tensors, DTensors or small picklable objects (no tensors inside
        lists). What is not a DTensor must be equal on all ranks: it is stored once. `metadata` must fit in JSON.
        Asynchronous (default: as the config says), it returns once tensors are copied to host memory; the caller may
        then change them. An earlier save still in flight is waited for.
        Raises `CheckpointError` when this or (asynchronous) the previous save fails, such as for lack of space.
        """
        self.wait()
        if asynchronous is None:
            asynchronous = self.config.asynchronous
        staged = self._stage(state, ()) if asynchronous else state
        self._save_in_flight = self._thread.submit(self._write, step, staged, copy.deepcopy(metadata))
        if not asynchronous:
            self.wait()

    def check(self) -> None:
        """Raise the `CheckpointError` of a save that has failed meanwhile; never waits."""
        if self._save_in_flight is not None and self._save_in_flight.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight, if any. Raises its `CheckpointError`."""
        save, self._save_in_flight = self._save_in_flight, None
        if save is not None:
            save.result()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint. Complete, but not verified yet: `load` does that."""
        self.wait()
        return max(_on_rank_0(lambda: complete_steps(self.folder), self.group), default=None)

    def load(self, state: dict[str, Any], step: int | None = None, *, optional: Collection[str] = ()) -> dict[str, Any]:
        """`load_checkpoint` from this run's folder. The next save removes the damaged checkpoints it passed over."""
        self.wait()
        metadata = load_checkpoint(self.folder, state, step, self.group, optional=optional)
        if step is None:
            self._damaged = {other for other in complete_steps(self.folder) if other > metadata["step"]}
        return metadata

    def close(self) -> None:
        """Wait for the save in flight and end the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step_*"):
                shutil.rmtree(leftover)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {error.strerror}; choose a folder that can be written") from error

    def _stage(self, node: Any, path: tuple[str, ...]) -> Any:
        """A copy of `node` on the CPU. Tensors go to buffers that are kept for the next save."""
        if isinstance(node, dict):
            return {key: self._stage(value, (*path, str(key))) for key, value in node.items()}
        if not isinstance(node, Tensor):
            return copy.deepcopy(node)
        node = node.detach()
        buffer = self._staging.get(path)
        if buffer is None or buffer.shape != node.shape or buffer.dtype != node.dtype:
            buffer = self._staging[path] = torch.empty_like(node, device="cpu")
        return buffer.copy_(node)

    def _write(self, step: int, state: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Runs in the background thread, on every rank."""
        final = checkpoint_path(self.folder, step)
        temporary = final.with_name(f".{final.name}.tmp")
        needed = sum(_collect(lambda: _bytes_to_write(state), self.group)) + _SLACK_BYTES
        try:
            _on_rank_0(lambda: self._check_space(needed), self.group)
            dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary), process_group=self.group)
            shards = _collect(lambda: _checksums(temporary.glob(f"__{_rank(self.group)}_*")), self.group)
            _on_rank_0(lambda: self._publish(step, temporary, shards, metadata), self.group)
        except (Exception, CheckpointException) as error:
            _on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True), self.group)
            raise CheckpointError(
                f"{final} was not written: {_root_cause(error)} (it needs {_megabytes(needed)}, the disk has "
                f"{_megabytes(shutil.disk_usage(self.folder).free)} free); mend that and --resume: earlier checkpoints "
                "are intact"
            ) from error
        _on_rank_0(self._remove_expired, self.group)

    def _check_space(self, needed: int) -> None:
        if shutil.disk_usage(self.folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _publish(self, step: int, temporary: Path, shards: list[dict[str, Any]], metadata: dict[str, Any]) -> None:
        write_atomically(
            temporary / _METADATA, json.dumps({"step": step, "version": __version__, **metadata}, indent=1)
        )
        checksums = _checksums([temporary / _DCP_METADATA, temporary / _METADATA])
        for shard in shards:
            checksums |= shard
        write_atomically(temporary / _CHECKSUMS, json.dumps(checksums, indent=1))
        sync(temporary)
        final = checkpoint_path(self.folder, step)
        replaced = _set_aside(final) if final.exists() else None
        temporary.rename(final)
        sync(self.folder)
        self._damaged.discard(step)
        if replaced:
            shutil.rmtree(replaced)

    def _remove_expired(self) -> None:
        """Delete what neither `keep_last` nor `milestone_interval` keeps, and what `load` found damaged."""
        intact = [step for step in complete_steps(self.folder) if step not in self._damaged]
        every = self.config.milestone_interval
        passing = [step for step in intact if not every or step % every]
        for step in (*sorted(self._damaged), *passing[: -self.config.keep_last]):
            path = checkpoint_path(self.folder, step)
            try:
                shutil.rmtree(_set_aside(path))
            except OSError as error:
                raise CheckpointError(f"{path} has expired but cannot be removed: {error.strerror}") from error
        self._damaged.clear()


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def complete_steps(folder: Path) -> list[int]:
    """Steps of the published checkpoints in `folder`, rising."""
    names = (path.name.removeprefix("step_") for path in folder.glob("step_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def load_checkpoint(
    folder: Path,
    state: dict[str, Any],
    step: int | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """Fill `state` from the checkpoint of `step`, or from the newest intact one, and return its metadata.

    `state` is built as for `Checkpointer.save`, in any parallel layout; it may leave out top-level entries (only
    `{"model": ...}` for inference), and those named in `optional` stay as they are where the checkpoint has none of
    them. Tensors are filled in place, other leaves are replaced in their dictionaries.
    Files are verified first; a damaged checkpoint is named in a warning and the one before it is used.
    Raises `CheckpointError`, with `state` untouched, when no checkpoint is intact (or not the one asked for), or when
    it is of another model.
    """
    steps = _on_rank_0(lambda: complete_steps(folder), group)
    known = ", ".join(map(str, steps)) or "none"
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise CheckpointError(f"{folder} has no {wanted}; complete ones: {known}")
    for candidate in reversed(steps if step is None else [step]):
        path = checkpoint_path(folder, candidate)
        damage = verify(path, group)
        if damage is None:
            return _load_intact(path, state, group, optional)
        if step is not None:
            raise CheckpointError(f"{path} is damaged: {damage}; choose another step of {known}")
        logger.warning("%s is damaged: %s; falling back to the checkpoint before it", path, damage)
    raise CheckpointError(f"{folder} has no intact checkpoint: all of {known} are damaged")


def verify(path: Path, group: dist.ProcessGroup | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, or None. The ranks of `group` share the reading."""

    def problem() -> str | None:
        try:
            expected = {_DCP_METADATA: None, _METADATA: None, **json.loads((path / _CHECKSUMS).read_bytes())}
            for name in sorted(expected)[_rank(group) :: _world_size(group)]:
                if _checksum(path / name) != expected[name]:
                    size = (path / name).stat().st_size
                    return f"{name} ({size:,} bytes) does not match {_CHECKSUMS} ({expected[name]})"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (OSError, ValueError, TypeError) as error:
            return f"{_CHECKSUMS} cannot be used: {error}"
        return None

    return next((found for found in _collect(problem, group) if found), None)


def _load_intact(
    path: Path, state: dict[str, Any], group: dist.ProcessGroup | None, optional: Collection[str]
) -> dict[str, Any]:
    try:
        record = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        entries = {name.partition(".")[0] for name in record}
        state = {name: entry for name, entry in state.items() if name in entries or name not in optional}
        _check_same_model(path, record, state, group)
        dcp.load(state, checkpoint_id=path, process_group=group)
        return json.loads((path / _METADATA).read_bytes())
    except (OSError, CheckpointException) as error:
        raise CheckpointError(f"{path} cannot be read: {_root_cause(error)}") from error


def _check_same_model(
    path: Path, record: dict[str, Any], state: dict[str, Any], group: dist.ProcessGroup | None
) -> None:
    """Compare names, global shapes and dtypes with DCP's own record of them, before anything is read."""
    saved = {name: _describe(entry) for name, entry in record.items() if name.partition(".")[0] in state}
    wanted = {name: _describe(leaf) for name, leaf in _leaves(state)}
    differing = [name for name, here in wanted.items() if saved.get(name) != here]
    first = next((names[0] for names in _collect(lambda: differing[:1], group) if names), None)
    if first is None:
        asked_for = torch.tensor([name in wanted for name in saved], dtype=torch.uint8)
        if group is not None:  # each pipeline stage asks for its own layers
            dist.all_reduce(asked_for, dist.ReduceOp.MAX, group=group)
        first = next((name for name, asked in zip(saved, asked_for.tolist(), strict=True) if not asked), None)
    if first is not None:
        raise CheckpointError(
            f"{path} is of another model: {first} is {saved.get(first, 'absent')} in the checkpoint and "
            f"{wanted.get(first, 'absent')} here; use the config in its {_METADATA}, or another run"
        )


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries under DCP's names: keys joined by dots."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _describe(leaf: Any) -> str:
    if isinstance(leaf, TensorStorageMetadata):
        return f"{list(leaf.size)} {leaf.properties.dtype}"
    return f"{list(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else "an object"


def _bytes_to_write(state: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank will write, roughly: of replicas only the first one writes."""
    total = 0
    for _, leaf in _leaves(state):
        if isinstance(leaf, DTensor):
            position = zip(leaf.device_mesh.get_coordinate() or (), leaf.placements, strict=False)
            if not any(index for index, placement in position if placement.is_replicate()):
                total += leaf.to_local().nbytes
        elif isinstance(leaf, Tensor) and (not dist.is_initialized() or dist.get_rank() == 0):
            total += leaf.nbytes
    return total


def _collect(action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """`action()` of every rank, on every rank. One rank's error is raised on all of them, so that none waits for it."""
    outcome: T | Exception
    try:
        outcome = action()
    except Exception as error:
        outcome = error
    outcomes: list[Any] = [outcome]
    if group is not None:
        outcomes = [None] * dist.get_world_size(group)
        dist.all_gather_object(outcomes, outcome, group=group)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def _on_rank_0(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run `action` on rank 0; its result or error on every rank, and none goes on before."""
    result: Any = _collect(lambda: action() if _rank(group) == 0 else None, group)[0]
    return result


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _world_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _set_aside(path: Path) -> Path:
    """Hide a checkpoint that is about to be deleted: a kill in the middle must not leave half of it under its name."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    return hidden


def _checksums(files: Iterable[Path]) -> dict[str, str]:
    return {path.name: _checksum(path) for path in sorted(files)}


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return f"{path.stat().st_size} bytes, sha256 {digest.hexdigest()}"


def _root_cause(error: BaseException) -> str:
    """What failed on the first rank: the operating system's error if there is one, without DCP's tracebacks."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return str(error) or type(error).__name__


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
