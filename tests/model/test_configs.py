"""The published settings, as the reports print them."""

import pytest

from pangu.config import load


@pytest.mark.parametrize(
    "name", ["pangu_ultra_135b", "yuan2_2b", "yuan2_51b", "yuan2_102b", "openpangu_1b", "openpangu_7b"]
)
def test_every_domain_has_a_weight_and_they_are_percentages(name: str) -> None:
    config = load(name)
    for phase in config.phases:
        assert phase.weights.keys() == config.data.domains.keys()
        assert sum(phase.weights.values()) == pytest.approx(100)
        assert phase.sequence_length <= config.model.max_position_embeddings


def test_pangu_ultra() -> None:
    config = load("pangu_ultra_135b")
    assert sum(phase.tokens or 0 for phase in config.phases) == 13.2e12
    assert [phase.sequence_length for phase in config.phases] == [4096, 4096, 8192, 32768, 131072]
    assert [phase.rope_base for phase in config.phases] == [1e4, 1e4, 1e5, 1.6e6, 2.56e7]
    assert [phase.learning_rate for phase in config.phases] == [1e-4, 1e-5, 1e-5, 7.5e-6, 7.5e-6]
    assert [phase.final_learning_rate for phase in config.phases] == [1e-5, None, 7.5e-6, None, None]
    tokens_per_step = [phase.batch_size * phase.sequence_length for phase in config.phases[2:]]
    assert tokens_per_step == [12_582_912] * 3
    assert config.data.reset_at_documents


@pytest.mark.parametrize(
    ("name", "steps", "rate"), [("yuan2_2b", 95_367, 2e-4), ("yuan2_51b", 63_578, 9e-5), ("yuan2_102b", 63_578, 3e-5)]
)
def test_yuan(name: str, steps: int, rate: float) -> None:
    config = load(name)
    (phase,) = config.phases
    assert phase.tokens == steps * phase.batch_size * phase.sequence_length
    assert phase.final_learning_rate == pytest.approx(phase.learning_rate / 10)
    assert phase.learning_rate == rate
    assert not config.data.reset_at_documents
    assert config.data.reset_positions
    assert config.data.fill_in_the_middle.rate == 0.5
