"""Every operator with inputs, and the same mathematics written down plainly, for the tests of all implementations."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import pangu_kernels
import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """`function(*inputs)` must equal `plain(*inputs)`; both may return None among their tensors."""

    name: str
    function: Function
    plain: Function
    make_inputs: Callable[["Maker"], Sequence[Any]]

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", requires_grad: bool = True) -> list[Any]:
        torch.manual_seed(0)
        return list(self.make_inputs(Maker(dtype, torch.device(device), requires_grad)))

    @property
    def operator(self) -> str:
        return self.name.split("-")[0]


@dataclass(frozen=True)
class Maker:
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def normal(self, *shape: int) -> Tensor:
        """Something to differentiate by."""
        x = torch.randn(shape, dtype=torch.float64).to(self.device, self.dtype)
        return x.requires_grad_(self.requires_grad)

    def constant(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape).to(self.device)


def boundaries(*lengths: int) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def cases() -> Iterator[Case]:
    for shape in ((1, 1), (3, 8), (127, 129), (2, 3, 4)):
        yield Case(_name("rms_norm", *shape), _rms_norm, _plain_rms_norm, partial(_rms_norm_inputs, shape=shape))
    for post, pre in ((True, True), (True, False), (False, True), (False, False)):
        for shape in ((1, 1), (129, 127)):
            name = _name("sandwich_norm", *shape) + "-post" * post + "-pre" * pre
            yield Case(
                name,
                partial(_sandwich_norm, post=post, pre=pre),
                partial(_plain_sandwich_norm, post=post, pre=pre),
                partial(_sandwich_norm_inputs, shape=shape, weights=post + pre),
            )
    for shape in ((1, 1, 2), (129, 3, 6), (3, 127, 128)):
        yield Case(_name("rope", *shape), pangu_kernels.rope, _plain_rope, partial(_rope_inputs, shape=shape))
    for shape in ((1, 2), (3, 254), (129, 258)):
        yield Case(_name("swiglu", *shape), pangu_kernels.swiglu, _plain_swiglu, partial(_swiglu_inputs, shape=shape))
    for name, heads, key_heads, q_lengths, k_lengths in _ATTENTION:
        options = {"q_lengths": q_lengths, "k_lengths": k_lengths, "causal": not name.startswith("all_keys")}
        yield Case(
            f"attention-{name}",
            partial(_attention, **options),
            partial(_plain_attention, **options),
            partial(
                _attention_inputs,
                heads=(heads, key_heads),
                lengths=(sum(q_lengths), sum(k_lengths)),
                head_dim=24 if name.endswith("uneven_heads") else 16,
            ),
        )
    for num_tokens, num_rows in ((1, 1), (129, 7)):
        yield Case(
            _name("embedding", num_tokens, num_rows),
            pangu_kernels.embedding,
            lambda tokens, weight: weight[tokens],
            partial(_embedding_inputs, shape=(num_tokens, num_rows)),
        )
    for num_tokens, vocab_size, chunk_size, weighted in ((1, 1, 0, False), (7, 129, 3, True), (129, 127, 64, False)):
        yield Case(
            _name("linear_cross_entropy", num_tokens, vocab_size, chunk_size),
            partial(_linear_cross_entropy, chunk_size=chunk_size),
            _plain_linear_cross_entropy,
            partial(_linear_cross_entropy_inputs, shape=(num_tokens, vocab_size), weighted=weighted),
        )
    for lengths in ((1,), (3, 0, 1, 5), (127, 2)):
        yield Case(
            _name("local_filter", *lengths),
            partial(_local_filter, lengths=lengths),
            partial(_plain_local_filter, lengths=lengths),
            partial(_local_filter_inputs, num_tokens=sum(lengths)),
        )


_ATTENTION = (
    ("one_token", 1, 1, (1,), (1,)),
    ("gqa", 6, 2, (3, 0, 1, 5), (3, 0, 1, 5)),
    ("mqa", 4, 1, (129,), (129,)),
    ("equal_documents", 2, 2, (4, 4, 4, 1, 1), (4, 4, 4, 1, 1)),
    ("decode", 4, 2, (1, 1, 1), (3, 1, 7)),
    ("chunked_prefill", 4, 2, (3, 0, 2, 1), (5, 4, 2, 6)),
    ("keys_without_queries", 2, 1, (0, 3), (2, 3)),
    ("blocks_of_queries", 2, 1, (300, 300), (300, 300)),
    ("blocks_behind_a_cache", 2, 2, (259,), (270,)),
    ("many_documents", 2, 1, (1, 2, 3) * 9, (1, 2, 3) * 9),
    ("tiles_of_every_fill", 2, 1, (95, 96, 97, 193), (95, 96, 97, 193)),
    ("uneven_heads", 4, 2, (3, 130, 1), (3, 130, 1)),
    ("behind_a_cache_uneven_heads", 4, 2, (3, 0, 2, 1), (5, 4, 2, 6)),
    ("all_keys_uneven_heads", 4, 2, (3, 0, 2, 2, 1), (1, 4, 0, 0, 3)),
    ("all_keys", 6, 2, (3, 2, 4), (1, 5, 4)),
    ("all_keys_of_equal_documents", 2, 2, (3, 3), (2, 2)),
    ("all_keys_or_none", 4, 2, (3, 0, 2, 2, 1), (1, 4, 0, 0, 3)),
    ("all_keys_no_keys", 2, 1, (2, 1), (0, 0)),
    ("all_keys_of_long_documents", 2, 1, (300, 40), (270, 290)),
)


def _name(operator: str, *sizes: int) -> str:
    return f"{operator}-{'x'.join(map(str, sizes))}"


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return pangu_kernels.rms_norm(x, weight, EPS)


def _plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _rms_norm_inputs(make: Maker, shape: tuple[int, ...]) -> list[Tensor]:
    return [make.normal(*shape), make.normal(shape[-1])]


def _sandwich_norm(residual: Tensor, y: Tensor, *weights: Tensor, post: bool, pre: bool) -> tuple[Tensor | None, ...]:
    return pangu_kernels.sandwich_norm(residual, y, weights[0] if post else None, weights[-1] if pre else None, EPS)


def _plain_sandwich_norm(
    residual: Tensor, y: Tensor, *weights: Tensor, post: bool, pre: bool
) -> tuple[Tensor, Tensor | None]:
    new_residual = residual + (_plain_rms_norm(y, weights[0]) if post else y)
    return new_residual, _plain_rms_norm(new_residual, weights[-1]) if pre else None


def _sandwich_norm_inputs(make: Maker, shape: tuple[int, int], weights: int) -> list[Tensor]:
    return [make.normal(*shape), make.normal(*shape), *(make.normal(shape[1]) for _ in range(weights))]


def _plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By a rotation matrix in place of halves."""
    half = x.shape[-1] // 2
    quarter_turn = torch.zeros(2 * half, 2 * half, dtype=x.dtype, device=x.device)
    quarter_turn[range(half), range(half, 2 * half)] = -1
    quarter_turn[range(half, 2 * half), range(half)] = 1
    return torch.einsum("td,thd->thd", cos, x) + torch.einsum("td,de,the->thd", sin, quarter_turn, x)


def _rope_inputs(make: Maker, shape: tuple[int, int, int]) -> list[Tensor]:
    return [make.normal(*shape), make.constant(shape[0], shape[2]), make.constant(shape[0], shape[2])]


def _plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def _swiglu_inputs(make: Maker, shape: tuple[int, int]) -> list[Tensor]:
    return [make.normal(*shape)]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int], causal: bool
) -> Any:
    return pangu_kernels.attention(q, k, v, boundaries(*q_lengths), boundaries(*k_lengths), 0.3, causal)


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int], causal: bool
) -> tuple[Tensor, Tensor]:
    """One dense mask over all documents together."""
    document_q = torch.repeat_interleave(torch.tensor(q_lengths)).to(q.device)
    document_k = torch.repeat_interleave(torch.tensor(k_lengths)).to(q.device)
    from_end_q = torch.cat([torch.arange(n).flip(0) for n in q_lengths]).to(q.device)
    from_end_k = torch.cat([torch.arange(n).flip(0) for n in k_lengths]).to(q.device)
    visible = document_q[:, None] == document_k  # [Tq, Tk]
    if causal:
        visible &= from_end_k >= from_end_q[:, None]
    group = q.shape[1] // k.shape[1]
    scores = 0.3 * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, dim=1))
    scores = scores.masked_fill(~visible, float("-inf"))
    probabilities = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0)
    out = torch.einsum("hqk,khd->qhd", probabilities, v.repeat_interleave(group, dim=1))
    return out, scores.logsumexp(-1).T.detach()


def _attention_inputs(make: Maker, heads: tuple[int, int], lengths: tuple[int, int], head_dim: int) -> list[Tensor]:
    return [
        make.normal(lengths[0], heads[0], head_dim),
        make.normal(lengths[1], heads[1], head_dim),
        make.normal(lengths[1], heads[1], head_dim),
    ]


def _embedding_inputs(make: Maker, shape: tuple[int, int]) -> list[Tensor]:
    num_tokens, num_rows = shape
    return [torch.arange(num_tokens, device=make.device) ** 2 % num_rows, make.normal(num_rows, 16)]


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    return pangu_kernels.linear_cross_entropy(x, weight, labels, loss_weights, chunk_size)


def _plain_linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    token_loss = F.cross_entropy(x @ weight.T, labels, reduction="none")
    return (token_loss if loss_weights is None else token_loss * loss_weights).sum(), token_loss.detach()


def _linear_cross_entropy_inputs(make: Maker, shape: tuple[int, int], weighted: bool) -> list[Any]:
    num_tokens, vocab_size = shape
    hidden_size = 16
    labels = make.integers(vocab_size, num_tokens)
    labels[1::3] = -100
    loss_weights = make.constant(num_tokens) if weighted else None
    return [make.normal(num_tokens, hidden_size), make.normal(vocab_size, hidden_size), labels, loss_weights]


def _local_filter(*inputs: Tensor, lengths: Sequence[int]) -> Tensor:
    return pangu_kernels.local_filter(*inputs, boundaries(*lengths))


def _plain_local_filter(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Document by document, with the convolutions of the published code."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x.T[None, :, :, None], weight.unsqueeze(-1), bias, padding=(1, 0))[0, :, : len(x), 0].T

    documents = [piece for piece in x.split(lengths) if len(piece)]
    return torch.cat([convolve(convolve(piece, weight1, bias1), weight2, bias2) for piece in documents])


def _local_filter_inputs(make: Maker, num_tokens: int) -> list[Tensor]:
    size = 6
    return [
        make.normal(num_tokens, size),
        make.normal(size // 2, size, 2),
        make.normal(size // 2),
        make.normal(size, size // 2, 2),
        make.normal(size),
    ]
