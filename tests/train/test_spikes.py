"""Spikes are counted against a window that neither they nor non-finite or skipped losses enter."""

import json
import math
import random

import pytest

from pangu.train.spikes import SpikeDetector


def losses(count: int, mean: float = 2.0, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(mean, 0.1) for _ in range(count)]


def filled(window: int = 16, deviations: float = 6.0) -> SpikeDetector:
    detector = SpikeDetector(window, deviations)
    assert not any(detector.update(loss) for loss in losses(window))
    return detector


def test_spike_is_counted_once_and_stays_out_of_the_window() -> None:
    detector = filled()
    before = detector.state_dict()["accepted"]
    assert detector.update(5.0)
    assert detector.state_dict()["accepted"] == before
    assert detector.update(5.0)  # the first spike has not raised the bar for the second
    assert not any(detector.update(loss) for loss in losses(100, seed=1))
    assert detector.count == 2


def test_low_loss_is_no_spike() -> None:
    assert not filled().update(-5.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_non_finite_loss_does_not_blind_the_window(bad: float) -> None:
    """In OLMo-core one NaN makes every step of the window after it look bad (peers.md, section E)."""
    detector = filled()
    assert not detector.update(bad)
    assert not any(detector.update(loss) for loss in losses(4, seed=1))
    assert detector.update(5.0)  # within a window's length of the bad loss
    assert not any(detector.update(loss) for loss in losses(40, seed=2))
    assert detector.count == 1


def test_skipped_step_changes_nothing() -> None:
    detector = filled()
    before = detector.state_dict()
    assert not detector.update(5.0, skipped=True)
    assert not detector.update(2.0, skipped=True)
    assert detector.state_dict() == before


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    detector = SpikeDetector(16, 6.0)
    assert not any(detector.update(loss) for loss in [*losses(15), 50.0])


def test_new_level_is_accepted_after_a_window_of_spikes() -> None:
    detector = filled()
    assert sum(detector.update(loss) for loss in losses(200, mean=4.0, seed=1)) == 16
    assert detector.update(8.0)


def test_resumed_detector_goes_on_exactly() -> None:
    stream = [*losses(30), 5.0, *losses(10, seed=1), 6.0, 7.0, *losses(30, seed=2), 5.0]
    uninterrupted = SpikeDetector(16, 6.0)
    expected = [uninterrupted.update(loss) for loss in stream]
    for stop in (10, 31, 42):
        first, second = SpikeDetector(16, 6.0), SpikeDetector(16, 6.0)
        found = [first.update(loss) for loss in stream[:stop]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        found += [second.update(loss) for loss in stream[stop:]]
        assert found == expected
        assert second.state_dict() == uninterrupted.state_dict()
