"""Sampling from a model: prompts of any lengths at once, as one flat stream per step, with a cache."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pangu.errors import ConfigError, DataError
from pangu.model.cache import Cache
from pangu.model.local_filter import filter_context
from pangu.model.seeding import generator
from pangu.model.transformer import Transformer

NextLogits = Callable[[Tensor, Tensor, Tensor, Cache], Tensor]
"""From new tokens of N sequences, their position_ids, cu_seqlens and a cache: logits `[N, V]` of each one's last."""


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eod_id: int | None = None,
    seed: int = 0,
    next_logits: NextLogits | None = None,
) -> list[list[int]]:
    """Continue every prompt by up to max_new_tokens tokens; the continuations, without the prompts.

    temperature 0 takes the likeliest token; otherwise tokens are drawn from the softmax of logits / temperature,
    restricted to the fewest likeliest ones whose probability reaches top_p. A sequence ends with eod_id, which is kept.
    Sequence i draws from a generator of its own, seeded by (seed, i): its text does not depend on its companions.
    `next_logits` stands in for the model's own where `model` is only a part of it.

    Raises ConfigError for sampling options out of range and DataError for prompts the model cannot read.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p)
    device = next(model.parameters()).device
    capacities = [len(prompt) + max_new_tokens for prompt in prompts]
    if next_logits is None:
        next_logits = partial(_next_logits, model)
    cache = Cache(capacities, filter_context(model.config, unbounded=max(capacities, default=0)), device)
    generators = [generator(seed, index) for index in range(len(prompts))]
    outputs: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts))) if max_new_tokens else []
    pending = [list(prompt) for prompt in prompts]  # tokens of each live sequence that the model has not seen
    while live:
        position_ids, cu_seqlens = cache.advance(live, [len(tokens) for tokens in pending])
        tokens = torch.tensor([token for tokens in pending for token in tokens], device=device)
        logits = next_logits(tokens, position_ids, cu_seqlens, cache)  # [live, V]
        draws = torch.cat([torch.rand(1, generator=generators[index]) for index in live])
        chosen = sample(logits, draws.to(device), temperature, top_p).tolist()
        for index, token in zip(live, chosen, strict=True):
            outputs[index].append(token)
        live = [index for index in live if outputs[index][-1] != eod_id and len(outputs[index]) < max_new_tokens]
        pending = [outputs[index][-1:] for index in live]
    return outputs


def logits_of_last_tokens(model: Transformer, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`[N, V]` from hidden states `[T, H]` of N sequences' new tokens, with boundaries cu_seqlens `[N+1]`."""
    last = cu_seqlens[1:].long() - 1
    return model.logits(hidden[last.to(hidden.device)])


def _next_logits(model: Transformer, tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor, cache: Cache) -> Tensor:
    return logits_of_last_tokens(model, model(tokens, position_ids, cu_seqlens, cache), cu_seqlens)


def sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """A token per row of logits `[N, V]`, int64 `[N]`: the distribution function inverted at draws `[N]` of [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.float().amax(-1, keepdim=True)  # so that no temperature makes them infinite
    probabilities, order = torch.softmax(logits / temperature, -1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    distribution = probabilities.cumsum(-1)
    target = draws[:, None] * distribution[:, -1:]
    rank = torch.searchsorted(distribution, target, right=True)
    rank = rank.minimum((probabilities > 0).sum(-1, keepdim=True) - 1)  # rounding may reach the total
    return order.gather(-1, rank).squeeze(-1)


def _check(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float
) -> None:
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens {max_new_tokens} is negative")
    if temperature < 0:
        raise ConfigError(f"temperature {temperature} is negative; 0 takes the likeliest token")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p {top_p} is not above 0 and at most 1; 1 samples from every token")
    vocab_size = model.config.vocab_size
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index} is empty; start it with a token, such as the end-of-document one")
        unknown = [token for token in prompt if not 0 <= token < vocab_size]
        if unknown:
            raise DataError(
                f"prompt {index} holds token {unknown[0]} but the model knows {vocab_size}; "
                "was it encoded with the model's own tokenizer?"
            )
