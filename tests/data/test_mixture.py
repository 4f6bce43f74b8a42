import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu.config import Config, DataConfig, DomainConfig, ModelConfig, PhaseConfig, TrainConfig
from pangu.data.mixture import CYCLE, Mixture, interleave
from pangu.data.permutation import permute
from pangu.data.schedule import Schedule
from pangu.errors import ConfigError, DataError

MODEL = ModelConfig(vocab_size=16, hidden_size=8, num_layers=1, num_attention_heads=2, intermediate_size=8)


def config(*phases: PhaseConfig, domains: int = 1, seed: int = 0) -> Config:
    names = {f"d{index}": DomainConfig(paths=("unused",)) for index in range(domains)}
    train = TrainConfig(seed=seed, steps=1_000_000)
    return Config(model=MODEL, data=DataConfig(domains=names), phases=phases, train=train)


def phase(tokens: int | None = None, **fields: object) -> PhaseConfig:
    defaults = {"name": "p", "sequence_length": 10, "batch_size": 1, "learning_rate": 1.0}
    return PhaseConfig(tokens=tokens, **(defaults | fields))  # type: ignore[arg-type]


def mixture(settings: Config, domain_tokens: list[int], stratum_tokens: int = 1 << 22) -> Mixture:
    return Mixture(settings, Schedule(settings).phase_sequences, domain_tokens, stratum_tokens)


def keys(key: int, count: int) -> np.ndarray:
    return np.full(count, key, np.uint64)


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    result = permute(np.arange(size), np.full(size, size), keys(key, size))
    assert np.array_equal(np.sort(result), np.arange(size))


@given(st.integers(1, 2**60), st.integers(0, 2**64 - 1), st.data())
@settings(deadline=None)
def test_permutation_of_any_size_stays_in_range_and_depends_on_one_entry_only(
    size: int, key: int, data: st.DataObject
) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5)))
    together = permute(index, np.full(len(index), size), keys(key, len(index)))
    alone = [permute(index[i : i + 1], np.array([size]), keys(key, 1))[0] for i in range(len(index))]
    assert together.tolist() == alone
    assert (together >= 0).all()
    assert (together < size).all()


def test_permutation_looks_random() -> None:
    size = 4096
    results = np.stack([permute(np.arange(size), np.full(size, size), keys(key, size)) for key in range(50)])
    assert (results == np.arange(size)).sum(axis=1).mean() == pytest.approx(1, abs=0.5)  # fixed points
    neighbours = np.abs(np.diff(results, axis=1)).mean()
    assert neighbours == pytest.approx(size / 3, rel=0.01)
    # Entries that share a digit inside the Feistel network do not stay together.
    upper = results // 64
    assert ((upper[:, 64:] - upper[:, :-64]) % 64 == 1).mean() == pytest.approx(1 / 64, rel=0.2)
    assert np.abs(results.mean(axis=0) - (size - 1) / 2).max() < 6 * size / np.sqrt(12 * 50)


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=8))
@settings(deadline=None)
def test_shares_are_exact_and_evenly_spread(weights: list[float]) -> None:
    cycle = interleave(weights)
    shares = np.array(weights) / sum(weights)
    assert cycle.share.sum() == CYCLE
    assert np.abs(cycle.share / CYCLE - shares).max() < 1 / CYCLE
    drawn = np.cumsum(np.eye(len(weights))[cycle.domain], axis=0)  # [CYCLE, domains]
    ideal = np.outer(np.arange(1, CYCLE + 1), cycle.share / CYCLE)
    assert np.abs(drawn - ideal).max() <= len(weights) / 2


def test_domain_counts_go_on_across_cycles() -> None:
    cycle = interleave([0.7, 0.2, 0.1])
    sequences = np.arange(2 * CYCLE + 123)
    domain, index = cycle.locate(sequences)
    for number in range(3):
        assert np.array_equal(index[domain == number], np.arange((domain == number).sum()))
    assert np.array_equal(cycle.consumed(len(sequences)), np.bincount(domain))


def test_a_share_too_small_to_keep_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight 5e-05 of 'd1'.*smallest share"):
        mixture(config(phase(weights={"d0": 1.0, "d1": 0.00005}), domains=2), [100, 100])


def test_a_domain_shorter_than_a_window_is_refused_if_the_phase_uses_it() -> None:
    short = phase(sequence_length=64, weights={"d0": 1.0})
    mixture(config(short, domains=2), [65, 64])
    with pytest.raises(DataError, match=r"domain 'd0' has 64 tokens.*64 \+ 1 of phase 'p'"):
        mixture(config(short, domains=2), [64, 65])


def read(order: Mixture, phase_index: int, count: int, domain: int = 0, first: int = 0) -> list[int]:
    domains, starts = order.locate(phase_index, np.arange(first, first + count))
    return starts[domains == domain].tolist()


@given(st.integers(11, 2000), st.integers(1, 10), st.integers(50, 3000), st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_reads_every_window_once_and_the_next_in_another_order(
    tokens: int, sequence_length: int, stratum_tokens: int, seed: int
) -> None:
    order = mixture(config(phase(sequence_length=sequence_length), seed=seed), [tokens], stratum_tokens)
    strata = min(max(tokens // stratum_tokens, 1), 64)
    stratum = (tokens - 1) // strata
    windows = [
        start * stratum + row * sequence_length for start in range(strata) for row in range(stratum // sequence_length)
    ]
    epochs = [read(order, 0, len(windows), first=epoch * len(windows)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == windows
    if len(windows) > 10:
        assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[0])


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 40), st.booleans()), min_size=2, max_size=5),
    st.integers(50, 3000),
    st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_phases_do_not_repeat_data_before_the_domain_is_exhausted(
    parts: list[tuple[int, int, bool]], stratum_tokens: int, open_end: bool
) -> None:
    """Each part is a phase: sequences per domain, sequence length, curriculum."""
    phases = [
        phase(2 * count * length, sequence_length=length, curriculum=("d0",) if curriculum else ())
        for count, length, curriculum in parts
    ]
    if open_end:
        phases[-1] = dataclasses.replace(phases[-1], tokens=None)
    # Just enough for all: rows are rounded up once per phase, and a stratum may end with a cut window.
    strata = 64
    needed = sum((count + strata) * length for count, length, _ in parts) + strata * 41
    order = mixture(config(*phases, domains=2), [needed, needed], stratum_tokens)
    seen = np.zeros(needed, np.int64)
    for index, (count, length, curriculum) in enumerate(parts):
        for domain in range(2):
            starts = read(order, index, 2 * count, domain)
            assert len(starts) == count
            assert max(starts) + length < needed
            if domain == 0:
                for start in starts:
                    seen[start : start + length] += 1
                if curriculum:
                    assert starts == sorted(starts)
    assert seen.max() == 1


def test_a_phase_goes_on_after_the_end_of_the_domain() -> None:
    """100 windows: the first phase takes 250, the second begins in the middle of the third epoch."""
    order = mixture(config(phase(2500), phase(1000)), [1001])
    windows = list(range(0, 1000, 10))
    first, second = read(order, 0, 250), read(order, 1, 100)
    assert sorted(first[:100]) == sorted(first[100:200]) == windows
    assert sorted(first[200:]) == windows[:50]
    assert sorted(second[:50]) == windows[50:]
    assert sorted(second[50:]) == windows[:50]


def test_a_curriculum_starts_anew_in_every_epoch() -> None:
    order = mixture(config(phase(curriculum=("d0",))), [1001], stratum_tokens=100)
    assert read(order, 0, 200) == 2 * list(range(0, 1000, 10))


def test_a_short_phase_sees_all_parts_of_the_corpus() -> None:
    order = mixture(config(phase(10_000)), [100_001], stratum_tokens=1000)
    starts = np.array(read(order, 0, 1000))
    assert np.histogram(starts, bins=10, range=(0, 100_000))[0].tolist() == pytest.approx([100] * 10, abs=20)


def test_order_does_not_depend_on_train_steps_or_on_later_phases() -> None:
    phases = [phase(3000), phase(2000, sequence_length=20)]
    base = config(*phases)
    longer = config(*phases, phase(5000, sequence_length=100))
    cut = dataclasses.replace(base, train=TrainConfig(steps=7))
    results = [[read(mixture(run, [100_001], 1000), index, 100) for index in range(2)] for run in (base, longer, cut)]
    assert results[0] == results[1] == results[2]


def test_seed_phase_and_domain_decide_the_order() -> None:
    orders = [
        read(mixture(config(phase(500), phase(500), domains=2, seed=seed), [1001, 1001]), index, 50, domain)
        for seed in range(2)
        for index in range(2)
        for domain in range(2)
    ]
    relative = {tuple(np.array(order) - min(order)) for order in orders}
    assert len(relative) == len(orders)
