import argparse
import ast
import csv
import gzip
import inspect
import json
import random
import shutil
import tarfile
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
from tokenizer_material import SAMPLE_BYTES, VOCAB_SIZE

from pangu.tokenizer import Tokenizer, train
from pangu.tokenizer.report import Report


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Path]]:
    """Much code, and little of everything else; as files of every kind."""
    folder = tmp_path_factory.mktemp("corpora")
    sources = [inspect.getsource(module) for module in (argparse, ast, csv, inspect, json, shutil, tarfile, textwrap)]
    (folder / "code").mkdir()
    for number, source in enumerate(sources):
        (folder / "code" / f"{number}.py").write_text(source, encoding="utf-8")
    docstrings = [
        inspect.getdoc(value) or ""
        for module in (argparse, ast, csv, inspect, shutil, tarfile, textwrap)
        for value in vars(module).values()
        if inspect.isclass(value) or inspect.isfunction(value)
    ]
    english = [json.dumps({"text": text}) for text in docstrings if text]
    (folder / "english.jsonl").write_text("\n".join(english), encoding="utf-8")
    chinese = [json.dumps({"text": text}, ensure_ascii=False) for text in made_up_chinese(60)]
    (folder / "chinese.jsonl.gz").write_bytes(gzip.compress("\n".join(chinese).encode()))
    draw = random.Random(0)
    sums = (f"{a} + {b} = {a + b}" for a, b in ((draw.randrange(999), draw.randrange(999)) for _ in range(3000)))
    (folder / "numbers.txt").write_text("\n".join(sums), encoding="utf-8")
    return {
        "code": [folder / "code"],
        "english": [folder / "english.jsonl"],
        "chinese": [folder / "chinese.jsonl.gz"],
        "numbers": [folder / "numbers.txt"],
    }


def made_up_chinese(documents: int) -> list[str]:
    """Sentences of made-up words, some of them much more frequent than others."""
    draw = random.Random(1)
    words = ["".join(chr(0x4E00 + draw.randrange(300)) for _ in range(draw.choice((1, 2, 2, 3)))) for _ in range(400)]
    frequencies = [1 / rank for rank in range(1, len(words) + 1)]
    return [
        "。".join("".join(draw.choices(words, frequencies, k=draw.randrange(5, 20))) for _ in range(10)) + "。\n"
        for _ in range(documents)
    ]


@pytest.fixture(scope="session")
def trained(corpora: Mapping[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return train(corpora, VOCAB_SIZE, folder, sample_bytes=SAMPLE_BYTES, show_progress=False), folder


@pytest.fixture(scope="session")
def tokenizer(trained: tuple[Report, Path]) -> Tokenizer:
    return Tokenizer(trained[1] / "tokenizer.model")
