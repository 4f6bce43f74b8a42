"""The decoder: Pangu Ultra's and Yuan 2.0's, over a flat stream of tokens, on one device.

    h = embedding(tokens)                                              # [T, H]
    in every block:  h = h + post_norm(attention(pre_norm(h)))         # sandwich norm; pre-norm has no post_norm
                     h = h + post_norm(feed_forward(pre_norm(h)))
    logits = head(norm(h))                                             # [T, V]

There is no batch dimension and no padding: documents lie end to end, `cu_seqlens` holds their boundaries, and attention
never crosses them. Weights are fp32; matmuls run in the dtype of their input, which is `compute_dtype` from the
embedding on.
"""

from typing import overload

import torch
from pangu_kernels import embedding, linear_cross_entropy
from pangu_kernels.rope import table_dtype
from torch import Tensor, nn
from torch.nn import functional as F

from pangu.config import ModelConfig
from pangu.model.attention import Attention
from pangu.model.cache import Cache, LayerCache
from pangu.model.feed_forward import FeedForward
from pangu.model.linear import Linear
from pangu.model.local import local
from pangu.model.norm import RMSNorm, add_post_norm, sandwich_norm
from pangu.model.rope import rotary_tables


class Embedding(nn.Module):
    """Rows of a table, `[T, H]` in a dtype, for tokens `[T]`."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.look_up = look_up

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.look_up(tokens, local(self.weight), dtype)


def look_up(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `[T, H]` of a table `[V, H]`."""
    return embedding(tokens, weight).to(dtype)


def project_to_vocabulary(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits `[T, V]` of hidden states `[T, H]` under the head's weight `[V, H]`."""
    return F.linear(hidden, weight.to(hidden.dtype))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each between its norms, on the residual stream `[T, H]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.norm_eps)

        self.attention_norm = norm()
        self.attention = Attention(config)
        self.post_attention_norm = norm() if config.has_post_norm else None
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(config)
        self.post_feed_forward_norm = norm() if config.has_post_norm else None

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        x = self.attention_norm(h)
        y = self.attention(x, cos, sin, cu_seqlens, cache)
        h, x = sandwich_norm(h, y, self.post_attention_norm, self.feed_forward_norm)
        y = self.feed_forward(x)
        return add_post_norm(h, y, self.post_feed_forward_norm)


class Transformer(nn.Module):
    """The whole decoder, on the default device and uninitialized: `init.init_weights` or a checkpoint fills it.

    `embedding`, `norm` and `head` may be None: a pipeline stage keeps only its own. A stage that does not read tokens
    (`reads_tokens`) is given the residual stream `[T, H]` in their place; it may still hold the embedding, as the head
    of a model with tied embeddings, which has no other. The attributes that are functions are what parallelism
    replaces by versions of the same meaning that communicate.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.rope_base = config.rope_base
        self.reads_tokens = True
        self.head_loss = linear_cross_entropy
        self.project_to_vocabulary = project_to_vocabulary
        self.embedding: Embedding | None = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(config) for i in range(config.num_layers)})
        self.norm: RMSNorm | None = RMSNorm(config.hidden_size, config.norm_eps)
        self.head: Linear | None = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)

    @overload
    def forward(
        self, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor, cache: Cache | None = None
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        cache: None,
        labels: Tensor,
        loss_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states `[T, H]` after the final norm; with labels, what `loss` returns.

        tokens and position_ids are int64 `[T]`, cu_seqlens int32 `[N+1]` on the CPU, starting at 0 and ending at T.
        """
        if self.reads_tokens:
            assert self.embedding is not None
            h = self.embedding(tokens, self.compute_dtype)
        else:
            h = tokens
        cos, sin = (
            table.to(table_dtype(h)) for table in rotary_tables(position_ids, self.config.head_dim, self.rope_base)
        )
        for index, block in self.layers.items():
            h = block(h, cos, sin, cu_seqlens, None if cache is None else cache.layer(index))
        if self.norm is not None:
            h = self.norm(h)
        return h if labels is None else self.head_loss(h, self.head_weight, labels, loss_weights)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[T, V]` in the dtype of hidden `[T, H]`."""
        return self.project_to_vocabulary(hidden, self.head_weight)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        loss_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every label in nats: its (weighted) sum, fp32 `[]`, and each token's, fp32 `[T]`, detached.

        labels int64 `[T]`, -100 for none; loss_weights fp32 `[T]`. The `[T, V]` logits never exist at once.
        """
        result: tuple[Tensor, Tensor] = self(tokens, position_ids, cu_seqlens, None, labels, loss_weights)
        return result

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output head `[V, H]`: the embedding's where they are tied."""
        owner = self.embedding if self.head is None else self.head
        assert owner is not None, "this stage has neither a head nor an embedding"
        return local(owner.weight)
