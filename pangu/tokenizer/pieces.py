"""What every Pangu tokenizer has in common: special pieces, where text may be cut, scores, and the model file.

Ids are, in order: the special pieces, the 256 bytes, then the learned pieces from the likeliest to the rarest. Pieces
hold spaces as they are, not as U+2581, so that a U+2581 in the text (it becomes bytes) decodes to itself.

A text is cut into words (`WORD`) before it is segmented. A learned piece lies within a word by construction, so cutting
changes no segmentation, and all the Viterbi scores of a word are small enough to be exact in float32: sentencepiece
(float32) and Hugging Face's tokenizers (float64) then find the same best path, ties included.
"""

import re
from collections.abc import Mapping
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

SCHEMA: Any = sentencepiece_model_pb2
"""The protobuf messages of sentencepiece's model files; they are made at run time, out of sight of type checkers."""

SPECIAL_PIECES = ("<unk>", "<pad>", "<eod>", "<sep>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")
"""<unk> is demanded by sentencepiece and never produced. <eod> ends every document. There is no <bos>: what precedes a
document is the <eod> of another. They are control pieces: no text encodes to them, they are inserted by id."""

BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))

ALPHABET = "".join(map(chr, range(0x20, 0x7F))) + "\t\n\r"
"""Characters that every vocabulary has as pieces, whatever the corpus."""

SMALLEST_VOCABULARY = len(SPECIAL_PIECES) + len(BYTE_PIECES) + len(ALPHABET)

LONGEST_PIECE = 16
"""Characters."""

LONGEST_RUN = 512
"""Spaces, other characters or newlines in a row after which a word is cut; in a longer run the best segmentation of
the whole may be missed. A word has at most three such runs."""

_RUN = f"{{1,{LONGEST_RUN}}}"
_RUN_OR_NOTHING = f"{{0,{LONGEST_RUN}}}"

WORD = (
    f" {_RUN}[^ \\n]{_RUN_OR_NOTHING}\\n{_RUN_OR_NOTHING}"  # spaces, what follows them, newlines at its end
    f"|[^ \\n]{_RUN}\\n{_RUN_OR_NOTHING}"
    f"|\\n{_RUN}"
)
"""Regular expression of a word, in the syntax common to Python and Oniguruma."""

SCORE_STEPS = 256
"""Scores are whole multiples of 1 / SCORE_STEPS. With LOWEST_SCORE, and 10 more for an unknown character, a word's
scores sum to less than 2^16, which float32 holds in steps of 2^-8."""

LOWEST_SCORE = -20 * SCORE_STEPS


def is_allowed(piece: str) -> bool:
    """Whether `piece` lies within a word wherever it occurs, has a decent length, and no digit unless it is one."""
    return (
        len(piece) <= LONGEST_PIECE
        and re.fullmatch(WORD, piece) is not None
        and (len(piece) == 1 or not any(map(str.isdecimal, piece)))
    )


def serialize(scores: Mapping[str, int]) -> bytes:
    """A sentencepiece model file of the learned pieces, in the order given, and their scores in 1 / SCORE_STEPS."""
    kind = SCHEMA.ModelProto.SentencePiece
    model = SCHEMA.ModelProto()
    for piece in SPECIAL_PIECES:
        model.pieces.add(piece=piece, score=0, type=kind.UNKNOWN if piece == "<unk>" else kind.CONTROL)
    for piece in BYTE_PIECES:
        model.pieces.add(piece=piece, score=0, type=kind.BYTE)
    for piece, score in scores.items():
        model.pieces.add(piece=piece, score=score / SCORE_STEPS, type=kind.NORMAL)
    trainer = model.trainer_spec
    trainer.model_type = SCHEMA.TrainerSpec.UNIGRAM
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = trainer.split_digits = trainer.allow_whitespace_only_pieces = True
    trainer.unk_piece, trainer.pad_piece, trainer.eos_piece = "<unk>", "<pad>", "<eod>"
    trainer.unk_surface = ""  # what <unk> decodes to
    trainer.unk_id, trainer.pad_id, trainer.eos_id, trainer.bos_id = 0, 1, 2, -1
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = normalizer.escape_whitespaces = False
    return model.SerializeToString(deterministic=True)


def load(scores: Mapping[str, int]) -> SentencePieceProcessor:
    """The encoder of learned pieces, once it has encoded the text of each of them with that very piece."""
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(serialize(scores))
    pieces = list(scores)
    encoded = processor.encode(pieces, num_threads=1)
    lost = [piece for piece, ids in zip(pieces, encoded, strict=True) if ids != [processor.piece_to_id(piece)]]
    if lost:
        raise RuntimeError(f"pieces that their own text is not encoded with: {lost[:5]}")
    return processor
