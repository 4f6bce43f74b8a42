"""Train a domain-balanced tokenizer: sample the corpora, analyze each domain, merge, verify, report."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from sentencepiece import SentencePieceProcessor

from pangu.data.corpus import list_files, texts
from pangu.errors import ConfigError, DataError
from pangu.files import write_atomically
from pangu.tokenizer import sampling, vocabulary
from pangu.tokenizer.pieces import SMALLEST_VOCABULARY, serialize
from pangu.tokenizer.report import Report, make_report, table
from pangu.tokenizer.sampling import Sample
from pangu.tokenizer.tokenizer import bytes_per_token
from pangu.tokenizer.vocabulary import Probabilities, Vocabulary

MODEL_FILE = "tokenizer.model"
REPORT_FILE = "tokenizer_report.json"

_SAMPLE_BYTES_PER_PIECE = 256

# How the weight of the worst-served domain is raised: by this factor, this often at most, until it gains this much.
_RAISE, _MOST_RAISES, _MARGIN = 1.25, 12, 1.005


def train(
    domains: Mapping[str, Sequence[str | Path]],
    vocab_size: int,
    output: Path,
    *,
    weights: Mapping[str, float] | None = None,
    sample_bytes: int | None = None,
    character_coverage: float = 0.9995,
    seed: int = 0,
    threads: int | None = None,
    text_field: str = "text",
    show_progress: bool = True,
) -> Report:
    """Write `output/tokenizer.model` and `output/tokenizer_report.json`, and print the report.

    domains: name to files and folders, read by `pangu.data.corpus`. About `sample_bytes` of each are learned from and
    held in memory (by default 256 per piece of the vocabulary), drawn at random from all of it.
    weights: share of each domain in the merged vocabulary. By default they are equal, except that the domain which a
    single-corpus tokenizer serves worst (fewest bytes per token) gets more until it is served better than by that.
    character_coverage: the rarest characters of a domain beyond this share of its text are left to bytes.
    threads: domains analyzed at a time (by default as many as cores). The files do not depend on it.

    Raises `ConfigError` for impossible arguments and `DataError` for corpora that cannot be read or hold too little.
    """
    _check_arguments(domains, vocab_size, output, weights, sample_bytes, character_coverage)
    sample_bytes = _SAMPLE_BYTES_PER_PIECE * vocab_size if sample_bytes is None else sample_bytes
    with _progress(show_progress) as progress:
        samples = _read(domains, sample_bytes, seed, text_field, progress)
        learned, single_corpus = _learn(samples, vocab_size, character_coverage, threads, progress)
        with _step(progress, "merging"):
            baseline = load(vocabulary.merge({"": single_corpus}, {"": 1}, vocab_size))
            weights, merged = _balance(learned, samples, baseline, vocab_size, weights)
        with _step(progress, "measuring"):
            tokenizers = {"merged": load(merged), "single_corpus": baseline}
            measured = _measure(learned, samples, tokenizers, vocab_size)
    model = serialize(merged.scores)
    report = make_report(learned, samples, weights, merged, measured, hashlib.sha256(model).hexdigest(), seed)
    try:
        write_atomically(output / REPORT_FILE, report.json())
        write_atomically(output / MODEL_FILE, model)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror}); free space or choose another folder") from None
    Console().print(table(report))
    return report


def load(merged: Vocabulary) -> SentencePieceProcessor:
    """The encoder of a vocabulary, after it has encoded each piece's text with that very piece."""
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(serialize(merged.scores))
    pieces = list(merged.scores)
    encoded = processor.encode(pieces, num_threads=1)
    lost = [piece for piece, ids in zip(pieces, encoded, strict=True) if ids != [processor.piece_to_id(piece)]]
    if lost:
        raise RuntimeError(f"pieces that their own text is not encoded with: {lost[:5]}")
    return processor


def _check_arguments(
    domains: Mapping[str, Sequence[str | Path]],
    vocab_size: int,
    output: Path,
    weights: Mapping[str, float] | None,
    sample_bytes: int | None,
    character_coverage: float,
) -> None:
    if not domains:
        raise ConfigError("domains: none given; name at least one and its files")
    if vocab_size <= SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size: {vocab_size} is too small; bytes, ASCII and special pieces alone are {SMALLEST_VOCABULARY}"
        )
    if weights is not None:
        if weights.keys() != domains.keys():
            raise ConfigError(f"weights: given for {sorted(weights)}, but the domains are {sorted(domains)}")
        if not all(0 < weight < float("inf") for weight in weights.values()):
            raise ConfigError(f"weights: {dict(weights)} must all be above 0; leave out a domain that is not wanted")
    if sample_bytes is not None and sample_bytes < 1:
        raise ConfigError(f"sample_bytes: {sample_bytes} must be above 0")
    if not 0.5 < character_coverage <= 1:
        raise ConfigError(f"character_coverage: {character_coverage} must be above 0.5 and at most 1")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {output} is a file; name a folder")
    for paths in domains.values():
        list_files(paths)


def _read(
    domains: Mapping[str, Sequence[str | Path]], sample_bytes: int, seed: int, text_field: str, progress: Progress
) -> dict[str, Sample]:
    samples = {}
    for name, paths in domains.items():
        with _step(progress, f"reading {name}"):
            sample = sampling.draw(texts(paths, text_field), sample_bytes, f"{seed} {name}")
        if not sample.held_out:
            raise DataError(
                f"domain {name!r} has {sample.bytes} bytes in {sample.documents} documents ({', '.join(map(str, paths))}); "
                "at least two documents are needed, one of them to measure on"
            )
        samples[name] = sample
    return samples


def _learn(
    samples: Mapping[str, Sample], vocab_size: int, character_coverage: float, threads: int | None, progress: Progress
) -> tuple[dict[str, Probabilities], Probabilities]:
    """The frequency analysis of every domain, and of the concatenation of all."""

    def analyze(name: str, documents: list[str]) -> Probabilities:
        with _step(progress, f"analyzing {name}"):
            return vocabulary.learn(documents, vocab_size, character_coverage)

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        concatenation = None
        if len(samples) > 1:  # first, being the longest
            concatenation = pool.submit(analyze, "the concatenation", sampling.concatenate(samples.values()))
        futures = {name: pool.submit(analyze, name, sample.training) for name, sample in samples.items()}
        learned = {name: future.result() for name, future in futures.items()}
        return learned, concatenation.result() if concatenation else next(iter(learned.values()))


def _balance(
    learned: Mapping[str, Probabilities],
    samples: Mapping[str, Sample],
    baseline: SentencePieceProcessor,
    vocab_size: int,
    weights: Mapping[str, float] | None,
) -> tuple[Mapping[str, float], Vocabulary]:
    """Weights, which sum to 1, and the vocabulary merged with them; see `train`. Held-out documents are not looked at."""
    if weights is not None:
        weights = _normalized(weights)
        return weights, vocabulary.merge(learned, weights, vocab_size)
    equal = _normalized(dict.fromkeys(learned, 1.0))
    first = vocabulary.merge(learned, equal, vocab_size)
    served = {name: bytes_per_token(baseline, samples[name].training) for name in learned}
    worst = min(served, key=served.__getitem__)
    weights, merged = equal, first
    for _ in range(_MOST_RAISES if len(learned) > 1 else 0):
        if bytes_per_token(load(merged), samples[worst].training) >= _MARGIN * served[worst]:
            return weights, merged
        weights = _normalized({**weights, worst: _RAISE * weights[worst]})
        merged = vocabulary.merge(learned, weights, vocab_size)
    return equal, first  # nothing helps that domain, so the others need not suffer for it


def _normalized(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _measure(
    learned: Mapping[str, Probabilities],
    samples: Mapping[str, Sample],
    tokenizers: Mapping[str, SentencePieceProcessor],
    vocab_size: int,
) -> dict[str, dict[str, float]]:
    """Bytes per token on each domain's held-out documents by tokenizer; "own" is trained on that domain alone."""
    measured = {}
    for name, probabilities in learned.items():
        try:
            own = {"own": load(vocabulary.merge({name: probabilities}, {name: 1}, vocab_size))}
        except DataError:
            own = {}  # the domain alone does not fill the vocabulary
        measured[name] = {
            tokenizer: bytes_per_token(processor, samples[name].held_out)
            for tokenizer, processor in {**tokenizers, **own}.items()
        }
    return measured


def _progress(show: bool) -> Progress:
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)


@contextmanager
def _step(progress: Progress, description: str) -> Iterator[None]:
    task = progress.add_task(description, total=1)
    yield
    progress.advance(task)
