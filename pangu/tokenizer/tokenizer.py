"""Text to token ids and back."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from pangu.errors import DataError
from pangu.tokenizer.pieces import LONGEST_RUN, SPECIAL_PIECES, WORD

# Whole lines, or as much of a long line as may be taken at once, because a call per word is slow. Each match is one or
# several words of `WORD`.
_WORDS = re.compile(
    f"[^\\n]{{0,{LONGEST_RUN}}}(?:\\n{{1,{LONGEST_RUN}}}|\\Z)"
    f"|[^\\n]{{0,{LONGEST_RUN - 1}}}[^\\n ](?= )"  # up to the last space that follows something else
    f"|{WORD}"
)


class Tokenizer:
    """A model file of `pangu tokenizer train`. Encoding and decoding are exact inverses for any text.

    Raises `DataError` when the file is missing, no sentencepiece model, or not one of ours.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); name a tokenizer's model file") from None
        self.fingerprint = hashlib.sha256(content).hexdigest()
        """sha256 of the model file, in hexadecimal."""
        self._processor = _load(content, str(path))
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id, self.eod_id, self.sep_id = map(self.id, ("<pad>", "<eod>", "<sep>"))
        self.fim_prefix_id, self.fim_suffix_id, self.fim_middle_id = map(
            self.id, ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in time linear in its length. No text yields a special id, not even its spelling.

        Raises `DataError` for half of a surrogate pair, which UTF-8 cannot express.
        """
        try:
            return encode_with(self._processor, text)
        except UnicodeEncodeError as error:
            raise DataError(
                f"character {error.start} of a text ({text[error.start]!a}) is half of a surrogate pair; remove it"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special ids, and ids outside the vocabulary (an embedding's padding rows), have none."""
        return self._processor.decode([int(id) for id in ids if 0 <= id < self.vocab_size])

    def id(self, piece: str) -> int:
        """The id of a piece; that of <unk> when there is no such piece."""
        return self._processor.piece_to_id(piece)

    def pieces(self) -> list[tuple[str, float]]:
        """Every piece and its score (natural logarithm of its probability; 0 for special pieces and bytes), by id."""
        ids = list(range(self.vocab_size))
        return list(zip(self._processor.id_to_piece(ids), self._processor.get_score(ids), strict=True))


def encode_with(processor: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """`Tokenizer.encode` for a model that has no file yet. Raises `UnicodeEncodeError` for a lone surrogate."""
    text.encode()  # sentencepiece would put a question mark in its place
    return list(itertools.chain.from_iterable(processor.encode(_WORDS.findall(text), num_threads=1)))


def bytes_per_token(processor: sentencepiece.SentencePieceProcessor, texts: Iterable[str]) -> float:
    """UTF-8 bytes of all texts over the number of their tokens."""
    text_bytes = tokens = 0
    for text in texts:
        text_bytes += len(text.encode())
        tokens += len(encode_with(processor, text))
    return text_bytes / tokens


def _load(content: bytes, path: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(content) and processor.LoadFromSerializedProto(content)
    except RuntimeError:
        loaded = False
    if not loaded:
        raise DataError(f"{path}: not a sentencepiece model; make one with: pangu tokenizer train")
    first = tuple(processor.id_to_piece(id) for id in range(min(len(SPECIAL_PIECES), processor.vocab_size())))
    probe = "  \u2581 a\t\n"
    if first != SPECIAL_PIECES or processor.decode(processor.encode(probe)) != probe:
        raise DataError(
            f"{path}: a sentencepiece model, but not one of Pangu's, whose first pieces are {' '.join(SPECIAL_PIECES)} "
            "and which reproduces any text; make one with: pangu tokenizer train"
        )
    return processor
