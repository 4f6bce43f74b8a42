"""Train a domain-balanced tokenizer: sample the corpora, analyze each domain, merge, report."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pangu.data.corpus import list_files, texts
from pangu.errors import ConfigError, DataError
from pangu.files import write_atomically
from pangu.tokenizer import sampling, vocabulary
from pangu.tokenizer.balance import Domain, balance, measure, merge_and_measure
from pangu.tokenizer.pieces import SMALLEST_VOCABULARY, load, serialize
from pangu.tokenizer.pruning import SURPLUS
from pangu.tokenizer.report import Report, make_report, print_report
from pangu.tokenizer.sampling import Sample
from pangu.tokenizer.vocabulary import Probabilities

MODEL_FILE = "tokenizer.model"
REPORT_FILE = "tokenizer_report.json"

_SAMPLE_BYTES_PER_PIECE = 256


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
    weights: share of each domain in the merged vocabulary; equal by default, except that one may need more in order to
    be served better than by a single-corpus tokenizer (`balance.balance`).
    character_coverage: the rarest characters of a domain beyond this share of its text are left to bytes.
    threads: domains analyzed at a time (by default as many as cores). The files do not depend on it.

    Raises `ConfigError` for impossible arguments and `DataError` for corpora that cannot be read or hold too little.
    """
    _check_arguments(domains, vocab_size, output, weights, sample_bytes, character_coverage)
    sample_bytes = _SAMPLE_BYTES_PER_PIECE * vocab_size if sample_bytes is None else sample_bytes
    with _progress(show_progress) as progress:
        samples = _read(domains, sample_bytes, seed, text_field, progress)
        learned, concatenated = _learn(samples, vocab_size, character_coverage, threads, progress)
        with _step(progress, "merging"):
            report, model = _merge(learned, concatenated, samples, vocab_size, weights)
    try:
        write_atomically(output / REPORT_FILE, report.json())
        write_atomically(output / MODEL_FILE, model)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror}); free some space or name another") from None
    print_report(report)
    return report


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
            sample = sampling.draw(texts(paths, text_field), sample_bytes, seed)
        if not sample.held_out:
            raise DataError(
                f"domain {name!r} ({', '.join(map(str, paths))}): {sample.documents} documents, {sample.bytes} bytes; "
                "two documents are needed, one of them to measure on"
            )
        samples[name] = sample
    return samples


def _learn(
    samples: Mapping[str, Sample], vocab_size: int, character_coverage: float, threads: int | None, progress: Progress
) -> tuple[dict[str, Domain], Probabilities]:
    """The frequency analysis of every domain, and that of the concatenation of all."""

    def analyze(name: str, documents: list[str], size: int) -> tuple[Mapping[str, int], Probabilities]:
        with _step(progress, f"analyzing {name}"):
            words = vocabulary.count_words(documents)
            return words, vocabulary.learn(words, size, character_coverage)

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        # First, because it takes longest.
        concatenation = pool.submit(analyze, "the concatenation", sampling.concatenate(samples.values()), vocab_size)
        size = round(SURPLUS * vocab_size)  # so that any domain could fill the vocabulary, with something left to prune
        futures = {name: pool.submit(analyze, name, sample.training, size) for name, sample in samples.items()}
        domains = {name: Domain(*future.result(), samples[name].held_out) for name, future in futures.items()}
        return domains, concatenation.result()[1]


def _merge(
    domains: Mapping[str, Domain],
    concatenated: Probabilities,
    samples: Mapping[str, Sample],
    vocab_size: int,
    weights: Mapping[str, float] | None,
) -> tuple[Report, bytes]:
    """The report and the model file."""
    single_corpus = measure(load(vocabulary.select(concatenated, vocab_size).scores), domains)
    own = {
        name: merge_and_measure({name: domain}, {name: 1.0}, vocab_size).bytes_per_token[name]
        for name, domain in domains.items()
    }
    if weights is None:
        merged = balance(domains, single_corpus, own, vocab_size)
    else:
        merged = merge_and_measure(domains, weights, vocab_size)
    size = merged.vocabulary.size
    if size < vocab_size:
        raise DataError(f"vocab_size: the corpora give {size} pieces, not {vocab_size}; lower it, or add text")
    model = serialize(merged.vocabulary.scores)
    return make_report(domains, samples, merged, single_corpus, own, model), model


def _progress(show: bool) -> Progress:
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)


@contextmanager
def _step(progress: Progress, description: str) -> Iterator[None]:
    task = progress.add_task(description, total=1)
    yield
    progress.advance(task)
