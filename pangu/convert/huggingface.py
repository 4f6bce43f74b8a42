"""Export to and import from a Hugging Face folder: safetensors, config.json, generation_config.json and tokenizer."""

import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pangu.config import ModelConfig
from pangu.convert.hf_config import read_config, write_config, write_generation_config
from pangu.convert.layouts import LAYOUTS, Target, TensorMap, choose, tensor_maps
from pangu.convert.safetensors_folder import (
    StoredTensor,
    read_headers,
    read_json,
    read_tensor,
    staged_folder,
    write_json,
    write_shards,
)
from pangu.errors import ConversionError, DataError
from pangu.model import Transformer
from pangu.tokenizer import Tokenizer, save_for_transformers

DTypeName = Literal["fp32", "bf16"]

_DTYPES: Mapping[DTypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

_FLOATING = {"F64", "F32", "F16", "BF16"}

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class ImportedModel:
    """What `import_` found in a folder."""

    config: ModelConfig
    """Norm placement is "sandwich" or "pre" unless the folder is an export of ours, which remembers the rest."""
    tensors: Mapping[str, Tensor]
    """Our parameter names to fp32 tensors on the CPU, each read from the files when asked for."""
    tokenizer: Path | None
    """The sentencepiece model, if there is one of ours: Pangu reads no others."""


def export(
    model_state: Mapping[str, Tensor],
    config: ModelConfig,
    output: Path,
    *,
    target: Target | Literal["auto"] = "auto",
    dtype: DTypeName = "fp32",
    tokenizer: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    rope_base: float | None = None,
) -> Target:
    """Write a model as a Hugging Face folder and return the layout it took.

    llama, glm4 and hyperclovax folders are loaded by transformers and vLLM. pangu_embedded ones carry the names of
    openPangu-Embedded and `sandwich_norm` for vLLM's PanguEmbeddedForCausalLM (`--trust-remote-code`); transformers
    alone has no class for them.

    `model_state` holds every parameter of the model by our names; tensors are taken from it one at a time and written
    by shards of at most `max_shard_bytes` (a larger tensor gets its own), so a mapping that reads them when asked keeps
    memory at one shard and one tensor. `rope_base` is the base of the last training phase; not given, the model's.
    `tokenizer` is a model file of `pangu tokenizer train`; without one the folder names no end-of-text token.

    `output` must not exist or be empty, and appears only once complete. Raises `ConversionError`, and leaves nothing
    behind, when the layout cannot express the model, the tensors are not the model's or the disk is full.
    """
    target = choose(config, target)
    maps = tensor_maps(config, LAYOUTS[target], _shapes(config))
    _check_names("the model's state", {entry.ours for entry in maps}, model_state.keys())
    vocabulary = None if tokenizer is None else _load_tokenizer(tokenizer, config)
    eos_id = None if vocabulary is None else vocabulary.eod_id
    pad_id = None if vocabulary is None else vocabulary.pad_id
    shards = _plan(maps, max_shard_bytes, _DTYPES[dtype].itemsize)
    with staged_folder(output) as folder:
        base = config.rope_base if rope_base is None else rope_base
        tree = write_config(config, target, rope_base=base, dtype=_DTYPES[dtype], eos_id=eos_id, pad_id=pad_id)
        write_json(folder / "config.json", tree)
        write_json(folder / "generation_config.json", write_generation_config(eos_id, pad_id))
        config_class = LAYOUTS[target].config_class
        if config_class is not None:
            shutil.copy(Path(__file__).with_name(config_class.split(".")[0] + ".py"), folder)
        if vocabulary is not None:
            save_for_transformers(vocabulary, folder)
        write_shards(folder, (_fill(shard, model_state, _DTYPES[dtype]) for shard in shards), len(shards))
    return target


def import_(folder: Path) -> ImportedModel:
    """Read a folder with a Llama, Glm4, HyperCLOVAX or openPangu-Embedded model.

    Only headers are read here, and the shape of every tensor is checked against config.json. Raises `ConversionError`
    naming what our model cannot express (RoPE scaling, windows, multipliers, norms on queries and keys, ...), and
    tensors that are missing, superfluous or of another shape.
    """
    source = str(folder / "config.json")
    target, config = read_config(read_json(folder / "config.json"), source)
    stored = {name: t for name, t in read_headers(folder).items() if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_embeddings and {_HEAD, _EMBEDDING} <= stored.keys():
        _check_tied(stored)
        del stored[_HEAD]
    maps = tensor_maps(config, LAYOUTS[target], _shapes(config))
    _check_names(str(folder), {name for entry in maps for name in entry.theirs}, stored.keys())
    for entry in maps:
        for name in entry.theirs:
            _check_stored(name, stored[name], entry.their_shape)
    return ImportedModel(config, _StoredModel(maps, stored), _our_tokenizer(folder))


class _StoredModel(Mapping[str, Tensor]):
    """Our names over their files."""

    def __init__(self, maps: Sequence[TensorMap], stored: Mapping[str, StoredTensor]) -> None:
        self._maps = {entry.ours: entry for entry in maps}
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        entry = self._maps[name]
        return entry.join([read_tensor(theirs, self._stored[theirs]) for theirs in entry.theirs])

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The model's parameters and their shapes, from the model itself; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _plan(maps: Sequence[TensorMap], max_shard_bytes: int, itemsize: int) -> list[list[TensorMap]]:
    """Consecutive tensors in shards of at most `max_shard_bytes`, but at least one tensor of ours."""
    shards: list[list[TensorMap]] = []
    room = 0
    for entry in maps:
        size = math.prod(entry.shape) * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= size
    return shards


def _fill(shard: Sequence[TensorMap], state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one file. Copies, because safetensors takes neither views nor shared memory."""
    tensors = {}
    for entry in shard:
        tensor = state[entry.ours].detach()
        if tuple(tensor.shape) != entry.shape:
            raise ConversionError(
                f"{entry.ours} of the model's state is {list(tensor.shape)}; its config makes it {list(entry.shape)}"
            )
        for name, part in zip(entry.theirs, entry.split(tensor), strict=True):
            tensors[name] = part.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    return tensors


def _load_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConversionError(
            f"{path} has {tokenizer.vocab_size} pieces, but model.vocab_size is {config.vocab_size}; "
            "export with the tokenizer that the model was trained with"
        )
    return tokenizer


def _our_tokenizer(folder: Path) -> Path | None:
    path = folder / "tokenizer.model"
    try:
        return Tokenizer(path).path
    except DataError:
        return None


def _check_names(where: str, expected: Collection[str], found: Collection[str]) -> None:
    for kind, names in (("lacks", set(expected) - set(found)), ("has unknown", set(found) - set(expected))):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ConversionError(f"{where} {kind} tensors for a model of this config: {shown}")


def _check_stored(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise ConversionError(f"{stored.path}: {name} is {list(stored.shape)}, but by config.json it is {list(shape)}")
    if stored.dtype not in _FLOATING:
        raise ConversionError(f"{stored.path}: {name} is {stored.dtype}; quantized weights cannot be read")


def _check_tied(stored: Mapping[str, StoredTensor]) -> None:
    head, embedding = (read_tensor(name, stored[name]) for name in (_HEAD, _EMBEDDING))
    if not torch.equal(head, embedding):
        raise ConversionError(
            f"{stored[_HEAD].path}: {_HEAD} differs from {_EMBEDDING} although config.json has tie_word_embeddings = "
            "true; set it to false"
        )
