"""A tokenizer as the files that Hugging Face's transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

from pangu.files import write_atomically
from pangu.tokenizer.pieces import SPECIAL_PIECES, WORD
from pangu.tokenizer.tokenizer import Tokenizer

# Special pieces and bytes are matched in text by the `tokenizers` library, unlike by sentencepiece, so they get a score
# that no best path has: their spellings are ASCII, which always has pieces of its own.
_NEVER = -1e9


def save_for_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and tokenizer.model to `folder`.

    `AutoTokenizer.from_pretrained(folder)` then gives the same ids for any text, adds none at its ends, and its
    `eos_token` is <eod>. `split_special_tokens` is on: a special piece spelled out in a text is text, as it is for us.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "tokenizer.json", json.dumps(_tokenizer_json(tokenizer), ensure_ascii=False, indent=1))
    write_atomically(folder / "tokenizer_config.json", json.dumps(_TOKENIZER_CONFIG, indent=2) + "\n")
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "eos_token": "<eod>",
    "additional_special_tokens": [p for p in SPECIAL_PIECES if p not in ("<unk>", "<pad>", "<eod>")],
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
}


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """In the format of the `tokenizers` library, version 1.0."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pieces = [(piece, score if score < 0 else _NEVER) for piece, score in tokenizer.pieces()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": piece, **flags} for id, piece in enumerate(SPECIAL_PIECES)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": WORD}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": True},
    }
