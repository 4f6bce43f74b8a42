import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pangu.config import (
    BatchSizeStep,
    Config,
    DataConfig,
    DomainConfig,
    FillInTheMiddleConfig,
    ModelConfig,
    PhaseConfig,
    TrainConfig,
)
from pangu.data.batch import Batch
from pangu.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, Metadata
from pangu.data.loader import Loader
from pangu.data.schedule import Schedule
from pangu.errors import ConfigError, DataError
from pangu.tokenizer.tokenizer import Tokenizer

EOD = 0


def write(prefix: Path, documents: list[list[int]], fingerprint: str = "f1", vocab_size: int = 1000) -> str:
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for document in documents:
        writer.add_document(document)
    metadata = Metadata(fingerprint, vocab_size, len(documents), sum(map(len, documents)), 0, prefix.name)
    writer.finish(metadata)
    return str(prefix)


def numbered(first: int, lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens count upwards from `first`, through all of them, each ending with EOD."""
    ends = np.cumsum(lengths) + first
    return [[*range(end - length, end - 1), EOD] for end, length in zip(ends.tolist(), lengths, strict=True)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 40, 12).tolist()
    data = {
        "first": DomainConfig(
            paths=(write(tmp_path / "a", numbered(1, lengths)), write(tmp_path / "b", numbered(401, lengths))),
            validation_paths=(write(tmp_path / "a.validation", numbered(100, [50, 51])),),
        ),
        "second": DomainConfig(paths=(write(tmp_path / "c", numbered(801, [30, 40, 50])),)),
    }
    ramp = (BatchSizeStep(tokens=100, batch_size=8),)
    phases = (
        PhaseConfig(name="one", tokens=400, sequence_length=8, batch_size=4, batch_size_ramp=ramp, learning_rate=1.0),
        PhaseConfig(name="two", sequence_length=16, batch_size=8, learning_rate=1.0, weights={"first": 3, "second": 1}),
    )
    return Config(
        model=ModelConfig(vocab_size=1000, hidden_size=8, num_layers=1, num_attention_heads=2, intermediate_size=8),
        data=DataConfig(domains=data),
        phases=phases,
        train=TrainConfig(steps=20),
    )


def synthetic(config: Config) -> Config:
    phases = tuple(dataclasses.replace(phase, weights={}) for phase in config.phases)
    return dataclasses.replace(config, data=DataConfig(synthetic=True), phases=phases)


def with_data(config: Config, **fields: object) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def loader(config: Config, dp_rank: int = 0, dp_size: int = 1) -> Loader:
    return Loader(config, Schedule(config), dp_rank, dp_size)


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "labels", "position_ids", "cu_seqlens")
    )


def rows(batches: list[Batch], sequence_length: int) -> list[list[int]]:
    """Tokens, labels and positions of every sequence."""
    joined = [torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "labels", "position_ids")]
    return torch.stack(joined, 1).reshape(-1, 3 * sequence_length).tolist()


def test_sequences_are_windows_of_the_stored_documents(config: Config) -> None:
    """Read back from the flat batches, against the documents."""
    following = {}
    for domain in config.data.domains.values():
        for path in domain.paths:
            for document in IndexedDataset(path):
                following |= dict(zip(document[:-1].tolist(), document[1:].tolist(), strict=True))
    run = loader(config)
    for step in range(run.schedule.total_steps):
        position = run.schedule.at(step)
        batches = list(run.batches(step))
        assert len(batches) == run.num_micro_batches(position) == position.batch_size
        for batch in batches:
            assert len(batch.tokens) == position.sequence_length
            boundaries = set(batch.cu_seqlens.tolist())
            for index, (token, label) in enumerate(zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)):
                assert label == (-100 if token == EOD else following[token])
                assert (token == EOD) <= (index + 1 in boundaries)
                assert (batch.position_ids[index] == 0) == (index in boundaries)


def test_weights_decide_the_share_of_domains(config: Config) -> None:
    run = loader(config)
    tokens = torch.cat([batch.tokens for step in range(15, 20) for batch in run.batches(step)])
    tokens = tokens[tokens != EOD]
    assert (tokens > 800).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("make", [lambda config: config, synthetic])
@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_ranks_and_micro_batches_do_not_change_a_step(
    config: Config, make, dp_size: int, micro_batch_size: int
) -> None:
    config = make(config)
    split = dataclasses.replace(config, train=TrainConfig(steps=20, micro_batch_size=micro_batch_size))
    whole, ranks = loader(config), [loader(split, rank, dp_size) for rank in range(dp_size)]
    for step in (0, 5, 19):
        length = whole.schedule.at(step).sequence_length
        parts = [batch for rank in ranks for batch in rank.batches(step)]
        assert {len(batch.tokens) for batch in parts} == {micro_batch_size * length}
        assert rows(parts, length) == rows(list(whole.batches(step)), length)


def test_uneven_shares_are_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"phase 'one': batch_size 4 is not a multiple of 3, .* 1 x 3 data-parallel"):
        loader(config, 0, 3)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("make", [lambda config: config, synthetic])
def test_prefetching_from_any_step_gives_the_same_batches(config: Config, make, prefetch: int) -> None:
    config = with_data(make(config), prefetch=prefetch)
    fresh = loader(config)
    with loader(config).prefetch(7) as stream:
        for step in range(7, 20):
            for ours, expected in zip(stream.batches(step), fresh.batches(step), strict=True):
                assert same(ours, expected)


def test_prefetching_is_bounded_and_ends_when_closed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    made = threading.Semaphore(0)
    original = Loader.batches

    def counted(self: Loader, step: int) -> Iterator[Batch]:
        for batch in original(self, step):
            made.release()
            yield batch

    monkeypatch.setattr(Loader, "batches", counted)
    stream = loader(with_data(config, prefetch=3)).prefetch()
    for _ in range(4):  # three wait in the queue and one for room in it
        assert made.acquire(timeout=10)
    assert not made.acquire(timeout=0.05)
    stream.close()
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_exceptions_of_the_thread_are_raised_where_batches_are_asked_for(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Loader, step: int) -> Iterator[Batch]:
        raise DataError("disk gone")

    monkeypatch.setattr(Loader, "batches", broken)
    with loader(with_data(config, prefetch=2)).prefetch() as stream:
        for _ in range(2):
            with pytest.raises(DataError, match="disk gone"):
                list(stream.batches(0))


def test_steps_come_in_order(config: Config) -> None:
    with loader(config).prefetch(2) as stream, pytest.raises(ValueError, match="step 3 asked for, but 2 comes next"):
        list(stream.batches(3))


def test_validation_is_spread_and_repeatable(config: Config) -> None:
    run = loader(config)
    assert run.validation_domains == ("first",)
    batches = list(run.validation("first", 8, 3))
    assert [batch.tokens[0].item() for batch in batches] == [100, 132, 164]  # of twelve windows: 0, 4, 8
    assert all(map(same, batches, run.validation("first", 8, 3)))
    assert len(list(run.validation("first", 8, 1000))) == 12


@pytest.mark.parametrize("make", [lambda config: config, synthetic])
@pytest.mark.parametrize("dp_size", [2, 4, 8])
def test_validation_gives_every_rank_the_same_shapes(config: Config, make, dp_size: int) -> None:
    config = dataclasses.replace(make(config), train=TrainConfig(steps=20, micro_batch_size=2))
    config = dataclasses.replace(
        config, phases=tuple(dataclasses.replace(phase, batch_size=16, batch_size_ramp=()) for phase in config.phases)
    )
    domain = loader(config).validation_domains[0]
    ranks = [list(loader(config, rank, dp_size).validation(domain, 8, 5)) for rank in range(dp_size)]
    assert len({tuple(len(batch.tokens) for batch in batches) for batches in ranks}) == 1
    labelled = [row for batches in ranks for row in rows(batches, 8) if set(row[1::3]) != {-100}]
    assert sorted(labelled) == sorted(rows(list(loader(config).validation(domain, 8, 5)), 8))


def test_synthetic_documents_can_be_learned_and_are_endless(config: Config) -> None:
    run = loader(synthetic(config))
    batches = [batch for step in range(20) for batch in run.batches(step)]
    assert max(batch.tokens.max().item() for batch in batches) < 1000
    assert len({tuple(batch.tokens.tolist()) for batch in batches}) == len(batches)
    for batch in batches:
        for first, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            document = batch.tokens[first:end]
            document = document[document != EOD] - 1
            strides = (document.diff() % 999).unique()
            assert len(strides) <= 1
            assert strides.numel() == 0 or 1 <= strides.item() <= 8


def test_synthetic_validation_is_not_trained_on(config: Config) -> None:
    run = loader(synthetic(config))
    validation = {tuple(batch.tokens.tolist()) for batch in run.validation("synthetic", 8, 50)}
    assert len(validation) == 50
    assert not validation & {tuple(batch.tokens.tolist()) for step in range(5) for batch in run.batches(step)}


def error_of(config: Config) -> str:
    with pytest.raises(DataError) as caught:
        loader(config)
    return str(caught.value)


def with_paths(config: Config, *paths: str, validation: tuple[str, ...] = ()) -> Config:
    first = DomainConfig(paths=paths, validation_paths=validation)
    return with_data(config, domains=config.data.domains | {"first": first})


def test_a_missing_dataset_names_domain_file_and_the_nearest(config: Config, tmp_path: Path) -> None:
    message = error_of(with_paths(config, str(tmp_path / "a.valdation")))
    assert "data.domains.first.paths" in message
    assert f"{tmp_path}/a.valdation.idx" in message
    assert f"did you mean {tmp_path}/a.validation?" in message
    message = error_of(with_paths(config, str(tmp_path / "a"), validation=(str(tmp_path / "nowhere" / "x"),)))
    assert "data.domains.first.validation_paths" in message
    assert f"no folder {tmp_path}/nowhere" in message


def test_an_empty_dataset(config: Config, tmp_path: Path) -> None:
    assert f"{tmp_path}/e is empty" in error_of(with_paths(config, write(tmp_path / "e", [])))


def test_a_dataset_shorter_than_a_window(config: Config, tmp_path: Path) -> None:
    short = write(tmp_path / "short", numbered(1, [16]))
    assert "domain 'first' has 16 tokens, less than one window of 16 + 1 of phase 'two'" in error_of(
        with_paths(config, short)
    )
    message = error_of(with_paths(config, str(tmp_path / "a"), validation=(short,)))
    assert "data.domains.first.validation_paths" in message
    assert "less than one window of 16 + 1" in message


def test_token_ids_beyond_the_model(config: Config, tmp_path: Path) -> None:
    path = write(tmp_path / "large", numbered(1, [100]), vocab_size=1001)
    assert f"dataset {path} was built with 1001 token ids, but model.vocab_size is 1000" in error_of(
        with_paths(config, path)
    )


def test_token_ids_beyond_the_model_without_metadata(config: Config, tmp_path: Path) -> None:
    path = write(tmp_path / "foreign", numbered(950, [100]))
    Path(f"{path}.json").unlink()
    with pytest.raises(DataError, match=r"foreign has token id 10\d\d, but model.vocab_size is 1000"):
        [batch for step in range(20) for batch in loader(with_paths(config, path)).batches(step)]


def test_datasets_of_different_tokenizers(config: Config, tmp_path: Path) -> None:
    other = write(tmp_path / "other", numbered(1, [100]), fingerprint="f2")
    message = error_of(with_paths(config, str(tmp_path / "a"), other))
    assert f"dataset {other} was built with tokenizer f2, but dataset {tmp_path}/a was built with f1" in message


def test_datasets_of_another_tokenizer_than_configured(
    config: Config, tmp_path: Path, tokenizer_path: Path, other_tokenizer_path: Path
) -> None:
    fingerprint, other = (Tokenizer(path).fingerprint for path in (tokenizer_path, other_tokenizer_path))
    path = write(tmp_path / "ours", numbered(1, [100]), fingerprint)
    config = with_data(config, domains={"first": DomainConfig(paths=(path,)), "second": DomainConfig(paths=(path,))})
    loader(with_data(config, tokenizer=str(tokenizer_path)))
    assert (
        f"dataset {path} was built with tokenizer {fingerprint[:12]}, "
        f"but data.tokenizer {other_tokenizer_path} is {other[:12]}"
    ) in error_of(with_data(config, tokenizer=str(other_tokenizer_path)))


def test_filling_in_the_middle(config: Config, tmp_path: Path, tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    texts = [f"training {number} on documents 盘古 🙂" for number in range(20)]
    path = write(
        tmp_path / "text", [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts], tokenizer.fingerprint
    )
    domains = {"first": DomainConfig(paths=(path,), validation_paths=(path,)), "second": DomainConfig(paths=(path,))}
    config = with_data(
        config,
        domains=domains,
        tokenizer=str(tokenizer_path),
        fill_in_the_middle=FillInTheMiddleConfig(rate=1.0, suffix_first_rate=0.0),
    )
    phase = dataclasses.replace(config.phases[1], sequence_length=200)
    config = dataclasses.replace(config, phases=(phase,))
    run, again = loader(config), loader(config, 1, 2)
    batches = list(run.batches(3))
    assert all(map(same, batches[len(batches) // 2 :], again.batches(3)))
    restored = []
    for batch in batches:
        for document in torch.tensor_split(batch.tokens, batch.cu_seqlens[1:-1].long()):
            ids = document.tolist()
            markers = [tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id, tokenizer.eod_id]
            if set(markers) <= set(ids):  # neither cut nor padding
                first, second, third, end = map(ids.index, markers)
                assert first == 0
                parts = ids[1:second], ids[third + 1 : end], ids[second + 1 : third]
                restored.append("".join(map(tokenizer.decode, parts)))
    assert len(set(restored) & set(texts)) > 10
    for batch in run.validation("first", 200, 2):
        assert tokenizer.fim_prefix_id not in batch.tokens


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """8 GB of tokens and 40 MB of index, read by a process that may allocate 32 MB."""
    documents, length = 2_000_000, 2100
    prefix = tmp_path / "huge"
    with open(f"{prefix}.bin", "wb") as data:
        data.truncate(documents * length * 2)  # a sparse file: it reads as zeros and takes no space
    with open(f"{prefix}.idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + b"\x08")
        index.write(np.array([documents, documents + 1], "<u8").tobytes())
        index.write(np.full(documents, length, "<i4").tobytes())
        index.write((np.arange(documents, dtype="<i8") * length * 2).tobytes())
        index.write(np.arange(documents + 1, dtype="<i8").tobytes())
    script = Path(__file__).parent / "read_within_limit.py"
    result = subprocess.run([sys.executable, script, prefix], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    tokens, grown = map(int, result.stdout.split())
    assert tokens == 2000 * 4096
    assert grown < 16 << 20
