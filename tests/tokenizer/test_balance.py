"""Which domain gets more weight, and when."""

import pytest

from pangu.tokenizer.balance import Domain, balance, poorest
from pangu.tokenizer.pieces import ALPHABET, SMALLEST_VOCABULARY

letters = dict.fromkeys(ALPHABET, 1e-6)

# By equal weights the only place left goes to "efgh", which is used a little more.
DOMAINS = {
    "poor": Domain({"abcd": 10, "x": 12}, {**letters, "abcd": 0.3}, ["abcd"]),
    "rich": Domain({"efgh": 10, "y": 10}, {**letters, "efgh": 0.3}, ["efgh"]),
}
SIZE = SMALLEST_VOCABULARY + 1


def test_the_weight_of_the_poorest_is_raised_until_it_is_served_better() -> None:
    merged = balance(DOMAINS, single_corpus={"poor": 1.0, "rich": 2.0}, own={"poor": 4.0, "rich": 4.0}, vocab_size=SIZE)
    assert merged.weights["poor"] > merged.weights["rich"]
    assert merged.bytes_per_token == {"poor": 4.0, "rich": 1.0}
    assert "abcd" in merged.vocabulary.scores
    assert merged.vocabulary.size == SIZE


@pytest.mark.parametrize("single_corpus", [{"poor": 0.9, "rich": 2.0}, {"poor": 5.0, "rich": 6.0}])
def test_weights_are_equal_when_nothing_else_is_needed_or_helps(single_corpus: dict[str, float]) -> None:
    merged = balance(DOMAINS, single_corpus, own={"poor": 9.0, "rich": 9.0}, vocab_size=SIZE)
    assert merged.weights == {"poor": 0.5, "rich": 0.5}
    assert "efgh" in merged.vocabulary.scores


def test_a_domain_that_could_not_have_more_is_not_the_poorest() -> None:
    assert poorest({"digits": 1.0, "code": 3.0, "prose": 4.0}, {"digits": 1.0, "code": 3.5, "prose": 4.5}) == "code"
    assert poorest({"digits": 1.0, "code": 3.0}, {"digits": 1.0, "code": 3.0}) == "digits"
