"""Where packed documents lie: the host side of every attention kernel."""

from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from pangu_kernels.checks import document_bounds


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent documents of `q_length` queries and `k_length` keys each, one batched call's worth."""

    count: int
    q_start: int
    q_length: int
    k_start: int
    k_length: int

    def queries(self, x: Tensor) -> Tensor:
        """Their rows of `[Tq, heads, ...]` as `[count, heads, q_length, ...]`, a view."""
        rows = x.narrow(0, self.q_start, self.count * self.q_length)
        return rows.view(self.count, self.q_length, *x.shape[1:]).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """Their rows of `[Tk, heads, ...]` as `[count, heads, k_length, ...]`, a view."""
        rows = x.narrow(0, self.k_start, self.count * self.k_length)
        return rows.view(self.count, self.k_length, *x.shape[1:]).transpose(1, 2)


def document_runs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor, k: Tensor, causal: bool) -> list[Run]:
    """All documents of a batch; ValueError for impossible boundaries."""
    q_bounds = document_bounds("attention", "cu_seqlens_q", cu_seqlens_q, len(q))
    k_bounds = document_bounds("attention", "cu_seqlens_k", cu_seqlens_k, len(k))
    runs: list[Run] = []
    for (q_start, q_stop), (k_start, k_stop) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        q_length, k_length = q_stop - q_start, k_stop - k_start
        if causal and q_length > k_length:
            raise ValueError(
                f"attention: with causal=True a document may not have more queries than keys, got {q_length} and "
                f"{k_length} from row {q_start} of q on"
            )
        if runs and (q_length, k_length) == (runs[-1].q_length, runs[-1].k_length):
            runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
        else:
            runs.append(Run(1, q_start, q_length, k_start, k_length))
    return runs
