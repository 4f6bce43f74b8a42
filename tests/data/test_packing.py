from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu.data.batch import Batch
from pangu.data.packing import pack

EOD, PAD = 0, 1


@dataclass
class ListWindow:
    documents: list[list[int]]

    def read(self, out: np.ndarray) -> list[int]:
        out[:] = np.concatenate(self.documents)
        return np.cumsum([len(document) for document in self.documents])[:-1].tolist()


def windows(*documents: list[list[int]]) -> list[ListWindow]:
    return [ListWindow(each) for each in documents]


def lists(batch: Batch) -> tuple[list[int], ...]:
    return tuple(tensor.tolist() for tensor in (batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens))


TWO = windows([[5, 6, EOD], [7, 8]], [[9, 9, 9, EOD], [3]])  # the second ends a document with its last token


def test_reset_at_documents() -> None:
    batch = pack(TWO, 4, reset_at_documents=True, reset_positions=True)
    assert lists(batch) == (
        [5, 6, EOD, 7, 9, 9, 9, EOD],
        [6, EOD, -100, 8, 9, 9, EOD, -100],
        [0, 1, 2, 0, 0, 1, 2, 3],
        [0, 3, 4, 8],
    )
    assert [tensor.dtype for tensor in (batch.tokens, batch.labels, batch.position_ids)] == 3 * [torch.int64]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.num_labels() == 6


def test_reset_positions_only() -> None:
    """Yuan 2.0: attention and labels cross documents, positions do not."""
    batch = pack(TWO, 4, reset_at_documents=False, reset_positions=True)
    assert lists(batch)[1:] == ([6, EOD, 7, 8, 9, 9, EOD, 3], [0, 1, 2, 0, 0, 1, 2, 3], [0, 4, 8])


def test_no_reset() -> None:
    batch = pack(TWO, 4, reset_at_documents=False, reset_positions=False)
    assert lists(batch)[1:] == ([6, EOD, 7, 8, 9, 9, EOD, 3], [0, 1, 2, 3, 0, 1, 2, 3], [0, 4, 8])


def test_padding_has_no_label() -> None:
    batch = pack(windows([[5, EOD], [PAD, PAD, PAD]]), 4, reset_at_documents=False, reset_positions=True, pad_id=PAD)
    assert batch.labels.tolist() == [EOD, -100, -100, -100]


@st.composite
def cut_windows(draw: st.DrawFn) -> tuple[list[ListWindow], int]:
    length = draw(st.integers(1, 12))
    result = []
    for _ in range(draw(st.integers(1, 7))):
        tokens = draw(st.lists(st.integers(1, 99), min_size=length + 1, max_size=length + 1))
        cuts = [0, *sorted(draw(st.sets(st.integers(1, length)))), length + 1]
        result.append(ListWindow([tokens[a:b] for a, b in pairwise(cuts)]))
    return result, length


@given(cut_windows())
@settings(deadline=None)
def test_a_batch_equals_a_loop_over_tokens(cut: tuple[list[ListWindow], int]) -> None:
    windows, length = cut
    batch = pack(windows, length, reset_at_documents=True, reset_positions=True)
    tokens, labels, positions, boundaries = [], [], [], []
    for index, window in enumerate(windows):
        for document in window.documents:
            if len(tokens) < (index + 1) * length:
                boundaries.append(len(tokens))
            tokens += document
            labels += [*document[1:], -100]
            positions += range(len(document))
        for values in (tokens, labels, positions):
            del values[(index + 1) * length :]
    assert lists(batch) == (tokens, labels, positions, [*boundaries, len(tokens)])


def test_to_keeps_the_boundaries_on_the_cpu() -> None:
    batch = pack(TWO, 4, reset_at_documents=True, reset_positions=True)
    moved = batch.to("meta")
    assert {moved.tokens.device.type, moved.labels.device.type, moved.position_ids.device.type} == {"meta"}
    assert moved.cu_seqlens.device.type == "cpu"
