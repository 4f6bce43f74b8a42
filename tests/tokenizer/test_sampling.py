"""A sample is bounded, reproducible and uniform."""

import tracemalloc
from collections.abc import Iterator

from pangu.tokenizer.sampling import LONGEST_DOCUMENT, concatenate, draw


def documents(count: int) -> Iterator[str]:
    for number in range(count):
        yield f"{number:06d}" + "x" * 994


def test_everything_is_taken_when_it_fits() -> None:
    sample = draw(documents(100), 1_000_000, 0)
    assert sorted(sample.training + sample.held_out) == list(documents(100))
    assert (sample.documents, sample.bytes) == (100, 100_000)
    assert len(sample.held_out) == 5


def test_no_more_than_the_limit_is_held() -> None:
    tracemalloc.start()
    sample = draw(documents(20_000), 100_000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(sample.training) + len(sample.held_out) == 100
    assert (sample.documents, sample.bytes) == (20_000, 20_000_000)
    assert peak < 1_000_000


def test_the_sample_is_drawn_from_all_of_the_corpus_and_repeatable() -> None:
    numbers = [int(text[:6]) for text in draw(documents(2000), 500_000, 0).training]
    assert 800 < sum(numbers) / len(numbers) < 1200
    assert numbers == [int(text[:6]) for text in draw(documents(2000), 500_000, 0).training]
    assert numbers != [int(text[:6]) for text in draw(documents(2000), 500_000, 1).training]


def test_the_order_and_repetitions_of_documents_do_not_matter() -> None:
    sample = draw(documents(300), 100_000, 0)
    again = draw([*reversed(list(documents(300))), *documents(300)], 100_000, 0)
    assert (again.training, again.held_out) == (sample.training, sample.held_out)


def test_a_long_document_counts_as_several_cut_at_line_ends() -> None:
    text = "".join(f"line {number}\n" for number in range(5000)) + "y" * (2 * LONGEST_DOCUMENT - 1)
    sample = draw([text], 10**9, 0)
    parts = sample.training + sample.held_out
    assert sum(map(len, parts)) == len(text)
    assert max(map(len, parts)) <= LONGEST_DOCUMENT
    assert all(part.endswith("\n") or set(part) == {"y"} for part in parts)
    assert sample.held_out


def test_the_concatenation_has_every_corpus_in_proportion() -> None:
    large = draw(documents(1000), 100_000, 0)
    small = draw((text.replace("x", "y") for text in documents(100)), 100_000, 0)
    texts = concatenate([large, small])
    counts = [sum(letter in text for text in texts) for letter in "xy"]
    assert counts[0] == len(large.training)
    assert 0.08 < counts[1] / counts[0] < 0.12
