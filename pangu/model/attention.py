"""Causal grouped-query attention over packed documents, with or without Yuan's local filter before queries and keys."""

from collections.abc import Callable

from pangu_kernels import attention, rope
from torch import Tensor, nn

from pangu.config import ModelConfig
from pangu.model.cache import LayerCache
from pangu.model.linear import InputProjection, Linear, OutputProjection, project_inputs, project_output
from pangu.model.local_filter import build_local_filter

CoreAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Multi-head attention of every token over its own document up to itself.

    Plain: queries, keys and values are projections of x. With a local filter (LFA, Yuan 2.0, section 3.1): queries and
    keys are projections of the filtered x, interleaved per head; values of x itself.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        self.local_filter = build_local_filter(config)
        if self.local_filter is None:
            self.q_proj = Linear(hidden, config.query_size, bias=bias)
            self.kv_proj = Linear(hidden, 2, config.key_value_size, bias=bias)
        else:
            self.qk_proj = Linear(hidden, config.num_attention_heads, 2, config.head_dim, bias=bias)
            self.v_proj = Linear(hidden, config.key_value_size, bias=bias)
        self.output_proj = Linear(config.query_size, hidden, bias=bias)
        self.project_inputs: InputProjection = project_inputs
        self.project_output: OutputProjection = project_output
        self.core_attention: CoreAttention = attention

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        """x `[T, H]`, cos and sin `[T, head_dim]`, cu_seqlens int32 `[N+1]` on the CPU -> `[T, H]`.

        With a cache, x holds the new tokens of each sequence; they see the cached ones too and are added to them.
        """
        q, k, v = self._project(x, cu_seqlens, cache)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        cu_seqlens_k = cu_seqlens
        if cache is not None:
            k, v, cu_seqlens_k = cache.extend(k, v)
        out, _ = self.core_attention(q, k, v, cu_seqlens, cu_seqlens_k, self.head_dim**-0.5)  # [T, heads, head_dim]
        return self.project_output(out.flatten(1), self.output_proj)

    def _project(self, x: Tensor, cu_seqlens: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[T, heads, head_dim]`, keys and values `[T, key_value_heads, head_dim]`."""
        if self.local_filter is None:
            q, kv = self.project_inputs(x, (self.q_proj, self.kv_proj))
            k, v = kv.unflatten(-1, (2, -1, self.head_dim)).unbind(1)
            return q.unflatten(-1, (-1, self.head_dim)), k, v
        if cache is None:
            filtered = self.local_filter(x, cu_seqlens)
        else:
            context, cu_seqlens_context = cache.with_context(x)
            filtered = cache.without_context(self.local_filter(context, cu_seqlens_context))
        (qk,) = self.project_inputs(filtered, (self.qk_proj,))
        (v,) = self.project_inputs(x, (self.v_proj,))
        q, k = qk.unflatten(-1, (-1, 2, self.head_dim)).unbind(2)
        return q, k, v.unflatten(-1, (-1, self.head_dim))
