"""Runs made of imported models."""

import dataclasses
import shutil
from pathlib import Path

from pangu import config as configuration
from pangu.config import CheckpointConfig, Config, ModelConfig
from pangu.convert import import_
from pangu.errors import ConfigError
from pangu.files import write_atomically
from pangu.train.checkpoint import Checkpointer
from pangu.train.run import CHECKPOINTS, CONFIG, TOKENIZER


def import_run(folder: Path, run: Path) -> None:
    """Make `run` of a Hugging Face folder: its weights as the checkpoint of step 0, to be trained by a fresh optimizer.

    Raises `ConversionError` when the folder cannot be read, `ConfigError` when `run` exists.
    """
    if run.exists() and any(run.iterdir()):
        raise ConfigError(f"{run} is not empty; choose another --output or delete it")
    imported = import_(folder)
    config = _imported_config(imported.config)
    state = {"model": dict(imported.tensors)}
    metadata = {"counters": {}, "config": configuration.to_tree(config), "rope_base": config.model.rope_base}
    with Checkpointer(run / CHECKPOINTS, CheckpointConfig()) as checkpointer:
        checkpointer.save(0, state, metadata, asynchronous=False)
    if imported.tokenizer is not None:
        shutil.copyfile(imported.tokenizer, run / TOKENIZER)
    write_atomically(run / CONFIG, configuration.show(config))


def _imported_config(model: ModelConfig) -> Config:
    """What a run needs besides its model; `pangu train CONFIG --resume` replaces it by CONFIG's."""
    tree = {
        "model": dataclasses.asdict(model),
        "data": {"synthetic": True},
        "phases": [
            {
                "name": "imported",
                "sequence_length": model.max_position_embeddings,
                "batch_size": 1,
                "learning_rate": 1e-5,
            }
        ],
        "train": {"steps": 1},
    }
    return configuration.from_tree(tree, "imported model")
