"""Tokens per second of the loader against reading the same windows with numpy, and time to build against sentencepiece.

    python benchmarks/data_loading.py [--tokens 256000000] [--rounds 7] [--output data_loading.json]

Loading: every window is read once, in the same random order, through a memory map made for the round. The loader finds
the documents and writes three int64 per token: token, label and position. It is compared with two loops over np.memmap:

    tokens   each micro-batch as an int64 tensor [windows, sequence_length + 1]: the bytes, nothing else
    +labels  two int64 tensors [windows, sequence_length], shifted by one: what a minimal training loop feeds

with the file in the page cache, and with it dropped from there before each round (`disk`), as it is for a corpus larger
than memory. Building: `pangu.data.build` in one process, against sentencepiece encoding the same texts in memory.
Figures are medians over rounds in which the contestants take turns; all use one thread.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from pangu.config import Config, DataConfig, DomainConfig, ModelConfig, PhaseConfig, TrainConfig
from pangu.data.build import build
from pangu.data.corpus import texts
from pangu.data.domains import DomainSource
from pangu.data.indexed_dataset import IndexedDatasetWriter, Metadata
from pangu.data.loader import Loader
from pangu.data.schedule import Schedule
from pangu.tokenizer.training import train

VOCAB_SIZE = 32_000
BATCH_SIZE = 256


@dataclass(frozen=True)
class Case:
    sequence_length: int
    micro_batch_size: int
    mean_document: int = 700
    disk: bool = False


CASES = (
    Case(2048, 8),
    Case(4096, 1),
    Case(4096, 4),
    Case(8192, 4),
    Case(32768, 1),
    Case(4096, 4, mean_document=100),
    Case(4096, 1, disk=True),
    Case(4096, 4, disk=True),
)


def write_dataset(prefix: Path, tokens: int, mean_document: int) -> None:
    """Random tokens in documents of log-normally distributed lengths."""
    random = np.random.default_rng(0)
    writer = IndexedDatasetWriter(prefix, np.uint16)
    while writer.tokens < tokens:
        lengths = random.lognormal(np.log(mean_document) - 0.5, 1.0, 1000).astype(np.int64) + 2
        writer.add_documents(random.integers(VOCAB_SIZE, size=lengths.sum(), dtype=np.uint16), lengths)
    writer.finish(Metadata("none", VOCAB_SIZE, int(writer.documents), int(writer.tokens), 0, "benchmark"))


def configure(prefix: Path, case: Case, steps: int) -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=VOCAB_SIZE, hidden_size=8, num_layers=1, num_attention_heads=2, intermediate_size=8
        ),
        data=DataConfig(domains={"benchmark": DomainConfig(paths=(str(prefix),))}),
        phases=(PhaseConfig(name="p", sequence_length=case.sequence_length, batch_size=BATCH_SIZE, learning_rate=1.0),),
        train=TrainConfig(steps=steps, micro_batch_size=case.micro_batch_size),
    )


def read_with_loader(config: Config) -> None:
    loader = Loader(config, Schedule(config))
    for step in range(loader.schedule.total_steps):
        for _ in loader.batches(step):
            pass


def read_tokens(prefix: Path, starts: Sequence[int], case: Case) -> None:
    tokens = np.memmap(f"{prefix}.bin", np.uint16, mode="r")
    for first in range(0, len(starts), case.micro_batch_size):
        out = np.empty((case.micro_batch_size, case.sequence_length + 1), np.int64)
        for row, start in enumerate(starts[first : first + case.micro_batch_size]):
            out[row] = tokens[start : start + case.sequence_length + 1]
        torch.from_numpy(out)


def read_tokens_and_labels(prefix: Path, starts: Sequence[int], case: Case) -> None:
    tokens = np.memmap(f"{prefix}.bin", np.uint16, mode="r")
    for first in range(0, len(starts), case.micro_batch_size):
        inputs = np.empty((case.micro_batch_size, case.sequence_length), np.int64)
        labels = np.empty_like(inputs)
        for row, start in enumerate(starts[first : first + case.micro_batch_size]):
            inputs[row] = tokens[start : start + case.sequence_length]
            labels[row] = tokens[start + 1 : start + case.sequence_length + 1]
        torch.from_numpy(inputs)
        torch.from_numpy(labels)


def time_in_turns(
    runs: dict[str, Callable[[], None]], rounds: int, prepare: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Median seconds of each; `prepare` runs, untimed, before every one."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            prepare()
            start = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_loading(folder: Path, tokens: int, rounds: int) -> list[dict[str, Any]]:
    print(
        f"{'sequence':>8}{'micro-batch':>12}{'document':>9}{'file in':>8}{'loader Mtok/s':>14}"
        f"{'tokens':>8}{'+labels':>9}{'/tokens':>9}{'/labels':>9}"
    )
    rows = []
    for case in CASES:
        prefix = folder / f"documents_of_{case.mean_document}"
        if not Path(f"{prefix}.idx").exists():
            write_dataset(prefix, tokens, case.mean_document)
        steps = tokens // 2 // (BATCH_SIZE * case.sequence_length)
        config = configure(prefix, case, steps)
        source = DomainSource(config, Schedule(config))
        starts = [window.start for window in source.windows(0, np.arange(steps * BATCH_SIZE))]  # type: ignore[attr-defined]
        del source
        seconds = time_in_turns(
            {
                "loader": lambda: read_with_loader(config),  # noqa: B023
                "tokens": lambda: read_tokens(prefix, starts, case),  # noqa: B023
                "tokens and labels": lambda: read_tokens_and_labels(prefix, starts, case),  # noqa: B023
            },
            rounds,
            lambda: drop_from_page_cache(prefix) if case.disk else None,  # noqa: B023
        )
        rates = {name: len(starts) * case.sequence_length / value for name, value in seconds.items()}
        rows.append(
            {
                "sequence_length": case.sequence_length,
                "micro_batch_size": case.micro_batch_size,
                "mean_document": case.mean_document,
                "file_in": "disk" if case.disk else "memory",
                "tokens_per_second": rates,
                "ratio_to_tokens": rates["loader"] / rates["tokens"],
                "ratio_to_tokens_and_labels": rates["loader"] / rates["tokens and labels"],
            }
        )
        print(
            f"{case.sequence_length:>8}{case.micro_batch_size:>12}{case.mean_document:>9}{rows[-1]['file_in']:>8}"
            f"{rates['loader'] / 1e6:>14.0f}{rates['tokens'] / 1e6:>8.0f}{rates['tokens and labels'] / 1e6:>9.0f}"
            f"{rows[-1]['ratio_to_tokens']:>9.0%}{rows[-1]['ratio_to_tokens_and_labels']:>9.0%}",
            flush=True,
        )
    return rows


def drop_from_page_cache(prefix: Path) -> None:
    gc.collect()  # a file that is still mapped stays
    with open(f"{prefix}.bin", "rb") as data:
        os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_building(folder: Path, rounds: int) -> dict[str, float]:
    """On the sources of Python's standard library."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(sources)))
    with contextlib.redirect_stdout(io.StringIO()):
        train({"code": [corpus]}, 8192, folder / "tokenizer", threads=1, show_progress=False)
    tokenizer = folder / "tokenizer" / "tokenizer.model"
    documents = list(texts([corpus]))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    megabytes = sum(len(text.encode()) for text in documents) / 1e6

    def build_dataset() -> None:
        build([corpus], folder / "built", tokenizer, workers=1, show_progress=False)

    def encode() -> None:
        for text in documents:
            processor.encode(text)

    seconds = time_in_turns({"build": build_dataset, "sentencepiece": encode}, rounds)
    result = {
        "megabytes": megabytes,
        "build_seconds_per_megabyte": seconds["build"] / megabytes,
        "sentencepiece_seconds_per_megabyte": seconds["sentencepiece"] / megabytes,
        "build_over_sentencepiece": seconds["build"] / seconds["sentencepiece"],
    }
    print(
        f"building {megabytes:.1f} MB: {result['build_seconds_per_megabyte']:.3f} s/MB, sentencepiece alone "
        f"{result['sentencepiece_seconds_per_megabyte']:.3f} s/MB, ratio {result['build_over_sentencepiece']:.2f}"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256_000_000, help="size of the dataset that is read")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where the datasets go; /tmp may be in memory, which has no disk to measure")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # In a training process activations have been freed before; from then on glibc keeps freed memory of a batch's size
    # instead of returning it to the kernel, which would clear it page by page at every batch, for all contestants.
    np.empty(16 << 20, np.uint8)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        loading = measure_loading(Path(folder), options.tokens, options.rounds)
        building = measure_building(Path(folder), options.rounds)
    if options.output:
        options.output.write_text(json.dumps({"loading": loading, "building": building}, indent=2) + "\n")


if __name__ == "__main__":
    main()
