"""Building a dataset from text: what is in it, that it never depends on the workers, and that it is whole or absent."""

import collections
import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu.data import build as build_module
from pangu.data.build import build
from pangu.data.indexed_dataset import IndexedDataset
from pangu.errors import DataError
from pangu.tokenizer.tokenizer import Tokenizer

BUILD_IN_ANOTHER_PROCESS = """
import sys
from pangu.data.build import build
build([sys.argv[1]], sys.argv[2], sys.argv[3], workers=2, show_progress=False)
"""


def _corpus(path: Path, documents: Iterable[object]) -> Path:
    lines = (json.dumps(document if isinstance(document, dict) else {"text": document}) for document in documents)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def _texts(count: int) -> list[str]:
    return [f"document {number}: " + "盘古 trains on Ascend. " * (number % 7) for number in range(count)]


def _decoded(prefix: str | Path, tokenizer_path: Path) -> list[str]:
    """The text of every document, each checked to end with its only <eod>."""
    tokenizer = Tokenizer(tokenizer_path)
    documents = [document.tolist() for document in IndexedDataset(prefix)]
    assert all(document.index(tokenizer.eod_id) == len(document) - 1 for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_CHUNK_CHARACTERS", 300)


def test_documents_arrive_in_order_ended_and_described(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "in").mkdir()
    _corpus(tmp_path / "in" / "b.jsonl", ["second", " \n", "", "third <eod> 盘古"])
    (tmp_path / "in" / "a.py").write_text("first = 1\n")
    (tmp_path / "in" / "c.txt").write_text("")
    result = build([tmp_path / "in"], tmp_path / "out" / "data", tokenizer_path, domain="code", workers=1)
    assert _decoded(tmp_path / "out" / "data", tokenizer_path) == ["first = 1\n", "second", "third <eod> 盘古"]
    assert sorted(_files(tmp_path / "out")) == ["data.bin", "data.idx", "data.json"]

    dataset = IndexedDataset(tmp_path / "out" / "data")
    tokenizer = Tokenizer(tokenizer_path)
    assert dataset.dtype == np.uint16
    assert result.skipped == 3
    assert result.validation is None
    assert result.dataset == dataset.metadata
    assert result.dataset.domain == "code"
    assert result.dataset.tokenizer_fingerprint == tokenizer.fingerprint
    assert result.dataset.vocab_size == tokenizer.vocab_size
    assert (result.dataset.documents, result.dataset.tokens) == (3, dataset.num_tokens)
    assert result.dataset.bytes == len("first = 1\n" + "second" + "third <eod> ") + 6


@settings(max_examples=20, deadline=None)
@given(documents=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=20))
def test_any_text_is_stored_as_the_tokenizer_encodes_it(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path, documents: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("build")
    kept = [text for text in documents if text.strip()]
    corpus = _corpus(folder / "a.jsonl", [*documents, "so that the corpus is not empty"])
    result = build([corpus], folder / "data", tokenizer_path, workers=1, show_progress=False)
    tokenizer = Tokenizer(tokenizer_path)
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in kept]
    assert [document.tolist() for document in IndexedDataset(folder / "data")][:-1] == expected
    assert result.skipped == len(documents) - len(kept)


def test_files_do_not_depend_on_the_number_of_workers(tmp_path: Path, tokenizer_path: Path) -> None:
    corpus = _corpus(tmp_path / "a.jsonl", [{"text": text, "level": len(text) % 5} for text in _texts(300)])
    built = []
    for workers in (1, 2, 3):
        prefix = tmp_path / str(workers) / "data"
        build(
            [corpus], prefix, tokenizer_path, workers=workers, shuffle_seed=1, sort_by="level", validation_fraction=0.2
        )
        built.append(_files(prefix.parent))
    assert len(built[0]) == 6
    assert built[0] == built[1] == built[2]


def test_held_out_documents_are_whole_and_chosen_by_their_text(tmp_path: Path, tokenizer_path: Path) -> None:
    texts = _texts(400)
    build([_corpus(tmp_path / "a.jsonl", texts)], tmp_path / "a", tokenizer_path, workers=1, validation_fraction=0.25)
    train, held_out = _decoded(tmp_path / "a", tokenizer_path), _decoded(tmp_path / "a.validation", tokenizer_path)
    assert sorted(train + held_out) == sorted(texts)
    assert 60 < len(held_out) < 140
    assert [text for text in texts if text in set(held_out)] == held_out

    # Neither order, nor neighbours, nor copies move a document to the other side.
    corpus = _corpus(tmp_path / "b.jsonl", [*reversed(texts), *texts[:50], "one more"])
    build([corpus], tmp_path / "b", tokenizer_path, workers=1, validation_fraction=0.25)
    assert set(_decoded(tmp_path / "b.validation", tokenizer_path)) - {"one more"} == set(held_out)
    assert not set(_decoded(tmp_path / "b", tokenizer_path)) & set(held_out)


def test_shuffling_is_a_permutation_of_whole_documents(tmp_path: Path, tokenizer_path: Path) -> None:
    texts = _texts(100)
    corpus = _corpus(tmp_path / "a.jsonl", texts)
    orders = []
    for seed in (1, 1, 2):
        build([corpus], tmp_path / "data", tokenizer_path, workers=1, shuffle_seed=seed)
        orders.append(_decoded(tmp_path / "data", tokenizer_path))
    assert orders[0] == orders[1]
    assert len({tuple(texts), *map(tuple, orders)}) == 3
    assert all(sorted(order) == sorted(texts) for order in orders)


def test_sorting_is_ascending_and_keeps_equals_in_order(tmp_path: Path, tokenizer_path: Path) -> None:
    levels = [3, -1.5, 3, 0, float("inf"), 0, 3] * 20
    documents = [{"text": f"{number}", "difficulty": level} for number, level in enumerate(levels)]
    corpus = _corpus(tmp_path / "a.jsonl", documents)
    build([corpus], tmp_path / "data", tokenizer_path, workers=1, sort_by="difficulty")
    order = [int(text) for text in _decoded(tmp_path / "data", tokenizer_path)]
    assert order == sorted(range(len(levels)), key=levels.__getitem__)


def test_equals_are_shuffled_when_sorting_and_shuffling(tmp_path: Path, tokenizer_path: Path) -> None:
    documents = [{"text": f"{number}", "difficulty": number // 50} for number in range(100)]
    corpus = _corpus(tmp_path / "a.jsonl", documents)
    build([corpus], tmp_path / "data", tokenizer_path, workers=1, sort_by="difficulty", shuffle_seed=0)
    order = [int(text) for text in _decoded(tmp_path / "data", tokenizer_path)]
    assert [number // 50 for number in order] == [0] * 50 + [1] * 50
    assert sorted(order) == list(range(100))
    assert order[:50] != list(range(50))


@pytest.mark.parametrize("value", [None, "hard", True, float("nan")])
def test_sorting_by_what_is_not_a_number_is_refused(tmp_path: Path, tokenizer_path: Path, value: object) -> None:
    corpus = _corpus(tmp_path / "a.jsonl", [{"text": "a", "level": 1}, {"text": "b", "level": value}])
    with pytest.raises(DataError, match=rf"a\.jsonl:2: 'level' is {value!r}; to sort by it"):
        build([corpus], tmp_path / "data", tokenizer_path, workers=1, sort_by="level")
    assert list(_files(tmp_path)) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0; it must be at least 0 and below 1"),
        ({"validation_fraction": 1e-9}, "splits 2 documents into 2 and 0; change it"),
        ({"workers": 0}, "workers is 0; at least one"),
        ({"text_field": "content"}, "no field 'content'"),
    ],
)
def test_impossible_options_are_refused(
    tmp_path: Path, tokenizer_path: Path, options: dict[str, object], message: str
) -> None:
    corpus = _corpus(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(DataError, match=message):
        build([corpus], tmp_path / "data", tokenizer_path, **{"workers": 1, **options})
    assert list(_files(tmp_path)) == ["a.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corpus_without_text_or_with_unreadable_text_leaves_the_old_dataset(
    tmp_path: Path, tokenizer_path: Path, workers: int
) -> None:
    corpus = _corpus(tmp_path / "a.jsonl", _texts(100))
    build([corpus], tmp_path / "data", tokenizer_path, workers=1)
    before = _files(tmp_path)
    broken = _corpus(tmp_path / "broken.jsonl", _texts(100))
    broken.write_bytes(broken.read_bytes() + b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"broken\.jsonl: not UTF-8"):
        build([broken], tmp_path / "data", tokenizer_path, workers=workers)
    broken.write_bytes(b'{"text": " "}\n\n')
    with pytest.raises(DataError, match=r"no text in this corpus \(1 empty documents\)"):
        build([broken], tmp_path / "data", tokenizer_path, workers=workers)
    broken.unlink()
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    ("texts", "validation_fraction"),
    [
        pytest.param(["x " * 2000] * 20, 0, id="tokens"),
        pytest.param(["x"] * 2000, 0, id="index"),
        pytest.param([f"{number % 1000}" for number in range(2000)], 0.9, id="index of the validation set"),
    ],
)
@pytest.mark.parametrize("shuffle_seed", [None, 1])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, tokenizer_path: Path, texts: list[str], validation_fraction: float, shuffle_seed: int | None
) -> None:
    """Stood in for by a limit on the size of files, which fails the same calls."""
    corpus = _corpus(tmp_path / "a.jsonl", ["an older corpus"])
    build([corpus], tmp_path / "data", tokenizer_path, workers=1, show_progress=False)
    _corpus(corpus, texts)
    before = _files(tmp_path)
    options = {"validation_fraction": validation_fraction, "shuffle_seed": shuffle_seed, "show_progress": False}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    try:
        with pytest.raises(DataError, match=r"data: the dataset cannot be written \(File too large\)"):
            build([corpus], tmp_path / "data", tokenizer_path, workers=1, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert _files(tmp_path) == before


@contextlib.contextmanager
def _paused_build(folder: Path, tokenizer_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A build of FOLDER/data in another process, in the middle of its corpus, which is a pipe that stays open."""
    pipe = folder / "pipe.jsonl"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", BUILD_IN_ANOTHER_PROCESS, str(pipe), str(folder / "data"), str(tokenizer_path)]
    process = subprocess.Popen(command)
    try:
        with pipe.open("w") as corpus:
            # More than the chunks that may be in flight: some have been tokenized and added.
            for text in ["long " * 250_000] * 8:
                corpus.write(json.dumps({"text": text}) + "\n")
            corpus.flush()
            _wait_for(lambda: (folder / "data.building" / "data.bin.tmp").stat().st_size)
            yield process
    finally:
        process.kill()
        process.wait()
        pipe.unlink()


def _workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes it spawned to tokenize."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_a_killed_build_leaves_no_dataset_and_no_workers_and_can_be_repeated(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    with _paused_build(tmp_path, tokenizer_path) as process:
        workers = _workers_of(process)
        assert len(workers) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        _wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
        assert list(tmp_path.glob("data.*")) == [tmp_path / "data.building"]
    corpus = _corpus(tmp_path / "a.jsonl", _texts(20))
    build([corpus], tmp_path / "data", tokenizer_path, workers=1)
    assert _decoded(tmp_path / "data", tokenizer_path) == _texts(20)
    assert sorted(path.name for path in tmp_path.glob("data*")) == ["data.bin", "data.idx", "data.json"]


def test_a_build_clears_the_work_folder_and_keeps_others_out(tmp_path: Path, tokenizer_path: Path) -> None:
    leftover = tmp_path / "data.building" / "leftover.tmp"
    leftover.parent.mkdir()
    leftover.touch()
    with _paused_build(tmp_path, tokenizer_path):
        assert not leftover.exists()
        corpus = _corpus(tmp_path / "a.jsonl", _texts(20))
        with pytest.raises(DataError, match="another process is building this dataset"):
            build([corpus], tmp_path / "data", tokenizer_path, workers=1)
        assert (tmp_path / "data.building" / "data.bin.tmp").exists()


def _kill_a_worker(tokenizer_path: Path) -> None:
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)


def _spoil_the_tokenizer(tokenizer_path: Path) -> None:
    tokenizer_path.write_bytes(b"not a model")


@pytest.mark.parametrize(
    ("accident", "message"), [(_kill_a_worker, "a tokenizing process died"), (_spoil_the_tokenizer, "tokenizer.model")]
)
def test_a_failing_worker_ends_the_build(
    tmp_path: Path, tokenizer_path: Path, accident: Callable[[Path], None], message: str
) -> None:
    """The corpus comes through a pipe, so that the accident happens between two of its documents."""
    copy = tmp_path / "tokenizer.model"
    copy.write_bytes(tokenizer_path.read_bytes())
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    lines = collections.deque(json.dumps({"text": text}) + "\n" for text in _texts(2000))

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), pipe.open("w") as corpus:
            if accident is _kill_a_worker:
                corpus.writelines(lines.popleft() for _ in range(200))
                corpus.flush()
            accident(copy)
            corpus.writelines(lines)

    feeder = threading.Thread(target=feed)
    feeder.start()
    with pytest.raises(DataError, match=message):
        build([pipe], tmp_path / "data", copy, workers=2, show_progress=False)
    feeder.join()
    assert not multiprocessing.active_children()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe.jsonl", "tokenizer.model"]
