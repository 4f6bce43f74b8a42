"""What the tests of this folder share."""

from hypothesis import strategies as st

VOCAB_SIZE = 1500
SAMPLE_BYTES = 120_000

FRAGMENTS = (
    *(" ", "  ", "\t", "\n", "\n\n", "\r", "\r\n", "\0", "\x7f", "\x85", "\u2028", "\u00a0", "\u3000", "\u200b"),
    *("\u2581", "\u2585", "\u2047", "\ufffd", "\ufeff", "\ue000", "\U0010ffff", "\uffff", "␤", "␉", "ᚠ"),
    *("e\u0301", "ﷺ", "👩‍👩‍👧", "🎉", "汉字", "𝔘", "٣٤", "１２", "0123", "Ⅷ"),
    *("<unk>", "<pad>", "<eod>", "<sep>", "<fim_prefix>", "<0x0A>", "<0x0a>", "</s>", "[SEP]"),
    *("def f(x):\n    return x", " self", "the", "a" * 600, " " * 600, "\n" * 600),
)

# Text of every kind that has ever broken a tokenizer.
any_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=4))).map(
        "".join
    ),
)
