"""Text from a run's model, on one device or, started by `pangu launch`, on the ranks of a layout."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pangu import device
from pangu.config import Config, ParallelConfig
from pangu.data.schedule import Schedule
from pangu.errors import ConfigError
from pangu.model import generate
from pangu.parallel.layout import make_layout
from pangu.parallel.mesh import connected, environment_rank
from pangu.parallel.model import build_model
from pangu.tokenizer import Tokenizer
from pangu.train.checkpoint import load_checkpoint
from pangu.train.run import CHECKPOINTS, load_model, run_config, tokenizer_path


def generate_text(
    run: Path,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    step: int | None = None,
    device_name: str = "auto",
    overrides: Sequence[str] = (),
    **sampling: Any,
) -> list[str] | None:
    """The prompts with their continuations; None on ranks other than 0.

    step: of the checkpoint, by default the newest intact one. overrides: `--parallel.field value` words; they describe
    the ranks that generate, whatever layout the run was trained in. sampling: as `pangu.model.generate` takes it.

    Raises `ConfigError` for what cannot be generated from, `CheckpointError` where nothing can be loaded.
    """
    rank, world_size, local_rank = environment_rank()
    config = _generation_config(run_config(run, overrides), world_size)
    layout = make_layout(config, world_size, first_step=Schedule(config).total_steps)
    path = tokenizer_path(run)
    if path is None:
        raise ConfigError(f"{run} has no tokenizer.model; it was trained without data.tokenizer")
    tokenizer = Tokenizer(path)
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not ids:
            raise ConfigError(f"--prompt {prompt!r} has no tokens; give it some text")
    sampling["eod_id"] = tokenizer.eod_id
    target = device.select(device_name, local_rank)
    if world_size == 1:
        continuations = generate(load_model(run, step, target), tokens, max_new_tokens, **sampling)
    else:
        with connected(target, config.parallel, world_size):
            model = build_model(config, layout, target)
            group = dist.new_group(backend="gloo")
            metadata = load_checkpoint(run / CHECKPOINTS, {"model": model.parameters}, step, group)
            model.rope_base = metadata["rope_base"]
            continuations = model.generate(tokens, max_new_tokens, **sampling)
    if rank > 0:
        return None
    return [prompt + tokenizer.decode(ids) for prompt, ids in zip(prompts, continuations, strict=True)]


def _generation_config(config: Config, world_size: int) -> Config:
    """Without what generation has no use for: a stream of a few tokens is not sharded, nor are documents."""
    parallel = ParallelConfig()
    if world_size > 1:
        given = replace(config.parallel, cp=1, dp_replicate=1, dp_shard=0)
        parallel = replace(given, sequence_parallel=False, zero_stage=3)
    return replace(config, parallel=parallel)
