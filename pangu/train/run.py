"""The files of a run, and models back from its checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pangu import config as configuration
from pangu.config import Config
from pangu.errors import CheckpointError
from pangu.model import Transformer
from pangu.train.checkpoint import load_checkpoint

CONFIG = "config.toml"
TOKENIZER = "tokenizer.model"
CHECKPOINTS = "checkpoints"
HANGS = "hangs"


def run_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config that `run` was trained with, under `--section.field value` overrides."""
    path = run / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{run} is not a run: it has no {CONFIG}; give the folder of `pangu train --output`")
    return configuration.load(path, overrides)


def longest_sequence(run: Path) -> int:
    """Tokens of the longest sequences the run's model is for, by its config and its phases."""
    config = run_config(run)
    return max(config.model.max_position_embeddings, *(phase.sequence_length for phase in config.phases))


def tokenizer_path(run: Path) -> Path | None:
    """The tokenizer of a run's data, which training copied into the run; None for a run without one."""
    run_config(run)
    path = run / TOKENIZER
    return path if path.is_file() else None


def load_model(run: Path, step: int | None = None, device: torch.device | str = "cpu") -> Transformer:
    """The model of a run's checkpoint at `step`, or of its newest intact one, with that step's RoPE base."""
    config = run_config(run)
    with torch.device("meta"):
        model = Transformer(config.model)
    model.to_empty(device=device)
    metadata = load_checkpoint(run / CHECKPOINTS, {"model": dict(model.named_parameters())}, step)
    model.rope_base = metadata["rope_base"]
    return model.eval()
