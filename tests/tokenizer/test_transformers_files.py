"""`transformers` reads text as we do."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_material import any_text

from pangu.tokenizer import Tokenizer, save_for_transformers
from pangu.tokenizer.pieces import ALPHABET, SCORE_STEPS, SPECIAL_PIECES, serialize

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_for_transformers(tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def theirs(saved: Path) -> "transformers.PreTrainedTokenizerBase":
    return transformers.AutoTokenizer.from_pretrained(saved)


@given(any_text)
def test_ids_and_text_are_the_same(
    tokenizer: Tokenizer, theirs: "transformers.PreTrainedTokenizerBase", text: str
) -> None:
    ids = tokenizer.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == text


def test_special_tokens(tokenizer: Tokenizer, theirs: "transformers.PreTrainedTokenizerBase") -> None:
    assert (theirs.eos_token, theirs.eos_token_id) == ("<eod>", tokenizer.eod_id)
    assert (theirs.pad_token, theirs.pad_token_id) == ("<pad>", tokenizer.pad_id)
    assert theirs.bos_token is None
    assert len(theirs) == tokenizer.vocab_size
    assert sorted(theirs.all_special_tokens) == sorted(SPECIAL_PIECES)
    ids = [tokenizer.eod_id, *tokenizer.encode("text"), tokenizer.eod_id]
    assert theirs.decode(ids, skip_special_tokens=True) == "text"


@pytest.mark.parametrize("model", ["llama", "glm4", "hyperclovax"])
def test_beside_the_config_of_a_model(saved: Path, tokenizer: Tokenizer, tmp_path: Path, model: str) -> None:
    """AutoTokenizer has opinions of its own about the tokenizers of known models."""
    save_for_transformers(tokenizer, tmp_path)
    transformers.AutoConfig.for_model(model).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "  def f():\n\t\u2581 <eod> 汉字 e\u0301 "
    assert theirs(text)["input_ids"] == tokenizer.encode(text)


def test_the_model_file_goes_along(saved: Path, tokenizer: Tokenizer) -> None:
    assert Tokenizer(saved / "tokenizer.model").fingerprint == tokenizer.fingerprint


@pytest.fixture(scope="session")
def ties(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, "transformers.PreTrainedTokenizerBase"]:
    """Ours and theirs of a vocabulary in which most texts have many best segmentations."""
    folder = tmp_path_factory.mktemp("ties")
    scores = dict.fromkeys(ALPHABET, -3 * SCORE_STEPS)
    scores |= {"ab": -6 * SCORE_STEPS, "ba": -6 * SCORE_STEPS, "aba": -9 * SCORE_STEPS, "bb": -5 * SCORE_STEPS}
    (folder / "tokenizer.model").write_bytes(serialize(scores))
    ours = Tokenizer(folder / "tokenizer.model")
    save_for_transformers(ours, folder / "saved")
    return ours, transformers.AutoTokenizer.from_pretrained(folder / "saved")


@given(st.text("ab", max_size=700))
def test_equally_good_segmentations_are_chosen_alike(
    ties: tuple[Tokenizer, "transformers.PreTrainedTokenizerBase"], text: str
) -> None:
    ours, theirs = ties
    assert theirs(text)["input_ids"] == ours.encode(text)
