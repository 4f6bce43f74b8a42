"""Tensors in a folder of safetensors files: sharded as Hugging Face does, written and read one part at a time."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pangu.errors import ConversionError
from pangu.files import sync

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, known from the file's header alone."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """In safetensors' spelling: F32, BF16, ..."""


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that takes its place when the block ends, and vanishes when it fails.

    `output` therefore exists only complete. Raises `ConversionError` at once when it already holds something, and
    when the disk is full.
    """
    output = output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists and is not an empty folder; give another one or delete it")
    staging = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in (*staging.rglob("*"), staging):
            sync(path)
        os.replace(staging, output)
        sync(output.parent)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{output} could not be written: {error}; nothing was left behind") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Raises `ConversionError` when the file is missing or is not a JSON object."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConversionError(f"{path} is not a JSON object")
    return tree


def write_shards(folder: Path, shards: Iterable[dict[str, Tensor]], count: int) -> None:
    """Write `count` dictionaries of contiguous CPU tensors, each to a file, and an index if there are several.

    Empties each dictionary once written, so that an iterator which fills them as asked keeps one in memory.
    """
    files: dict[str, str] = {}
    total_size = 0
    for number, tensors in enumerate(shards, start=1):
        file = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors makes it readable by its owner alone
        files |= dict.fromkeys(tensors, file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        tensors.clear()
    if count > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": files})


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in a folder's safetensors files, without reading any.

    Raises `ConversionError` when the files are missing, damaged or do not hold what the index says.
    """
    if (folder / INDEX_FILE).is_file():
        files = read_json(folder / INDEX_FILE).get("weight_map", {})
        stored = {name: tensor for file in sorted(set(files.values())) for name, tensor in _header(folder / file)}
        if stored.keys() != files.keys():
            wrong = sorted(stored.keys() ^ files.keys())
            raise ConversionError(f"{folder / INDEX_FILE} does not match the files it lists: {_some(wrong)}")
        return stored
    if (folder / SINGLE_FILE).is_file():
        return dict(_header(folder / SINGLE_FILE))
    raise ConversionError(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model with safe_serialization=True"
    )


def read_tensor(name: str, stored: StoredTensor) -> Tensor:
    """One tensor, on the CPU, in fp32 (exact for bf16 and fp16)."""
    with safe_open(stored.path, framework="pt") as file:
        return file.get_tensor(name).float()


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                header = file.get_slice(name)
                yield name, StoredTensor(path, tuple(header.get_shape()), header.get_dtype())
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path} cannot be read: {error}; fetch it again") from None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
