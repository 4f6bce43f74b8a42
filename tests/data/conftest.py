from collections.abc import Iterable
from pathlib import Path

import pytest

from pangu.tokenizer.pieces import ALPHABET, serialize


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that knows a few words and reads any text."""
    return _tokenizer(tmp_path_factory.mktemp("tokenizer"), ["document", " train", "ing", " on", "盘古"])


@pytest.fixture(scope="session")
def other_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, for data that was not built with it."""
    return _tokenizer(tmp_path_factory.mktemp("tokenizer"), ["word"])


def _tokenizer(folder: Path, words: Iterable[str]) -> Path:
    path = folder / "tokenizer.model"
    path.write_bytes(serialize({**dict.fromkeys(words, -100), **dict.fromkeys(ALPHABET, -1000)}))
    return path
