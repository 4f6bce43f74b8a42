import argparse
import inspect
import io
import json.decoder
from pathlib import Path
from types import ModuleType

import pytest
import sentencepiece

SPECIAL = ["<eod>", "<pad>", "<sep>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of a few hundred pieces that reads any text."""
    return _train(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", argparse)


@pytest.fixture(scope="session")
def other_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, for data that was not built with it."""
    return _train(tmp_path_factory.mktemp("tokenizer") / "other.model", json.decoder)


def _train(path: Path, module: ModuleType) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(module).splitlines()),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=SPECIAL,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path
