import pytest
import torch
from model_helpers import LOCAL_FILTERS, boundaries, random_model, small_config
from torch import Tensor

from pangu.errors import ConfigError, DataError
from pangu.model import Transformer, generate
from pangu.model.cache import Cache
from pangu.model.generate import sample
from pangu.model.local_filter import filter_context

PROMPTS = [[5], [7, 3], [2, 9, 4, 8, 1, 6, 11, 13, 10], [90, 20, 30]]


def full_logits(model: Transformer, tokens: list[int]) -> Tensor:
    return model.logits(model(torch.tensor(tokens), torch.arange(len(tokens)), boundaries([len(tokens)])))


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"norm_placement": "pre", "num_key_value_heads": 6}, id="pre-norm"),
        pytest.param({"attention_bias": True}, id="sandwich-grouped"),
        *(pytest.param({"local_filter": name}, id=name) for name in LOCAL_FILTERS),
    ],
)
def test_prefill_and_decode_equal_the_full_forward(changes: dict[str, object]) -> None:
    """Ragged prompts, one and two tokens long too; several tokens at once after the prompt; sequences that drop out."""
    model = random_model(small_config(**changes))
    texts = [prompt + [(7 * i + len(prompt)) % 97 for i in range(6)] for prompt in PROMPTS]
    wanted = [full_logits(model, text) for text in texts]
    capacities = [len(text) for text in texts]
    cache = Cache(capacities, filter_context(model.config, unbounded=max(capacities)), torch.device("cpu"))
    seen = [0] * len(texts)
    plan = [([0, 1, 2, 3], [len(prompt) for prompt in PROMPTS])]  # (sequences, tokens of each)
    plan += [([0, 1, 2, 3], [1, 1, 1, 1]), ([3, 0, 2], [1, 1, 1]), ([2, 0], [3, 1]), ([1], [4]), ([0, 2], [3, 1])]
    for sequences, counts in plan:
        new = [texts[s][seen[s] : seen[s] + n] for s, n in zip(sequences, counts, strict=True)]
        position_ids, cu_seqlens = cache.advance(sequences, counts)
        tokens = torch.tensor([token for piece in new for token in piece])
        logits = model.logits(model(tokens, position_ids, cu_seqlens, cache))
        expected = torch.cat([wanted[s][seen[s] : seen[s] + n] for s, n in zip(sequences, counts, strict=True)])
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        for s, n in zip(sequences, counts, strict=True):
            seen[s] += n
    assert seen[0] == len(texts[0])
    assert seen[2] == len(texts[2])


def test_lfa_caches_two_inputs() -> None:
    model = random_model(small_config(local_filter="two_convolutions_norm"))
    cache = Cache([1000], filter_context(model.config), torch.device("cpu"))
    position_ids, cu_seqlens = cache.advance([0], [9])
    with torch.no_grad():
        model(torch.tensor(PROMPTS[2]), position_ids, cu_seqlens, cache)
    assert cache.layer("0")._buffers["inputs"].shape == (2, 36)


def test_a_full_cache_is_refused() -> None:
    cache = Cache([3, 9], 0, torch.device("cpu"))
    cache.advance([0, 1], [2, 2])
    with pytest.raises(ValueError, match=r"\[4, 3\] tokens outgrow \[3, 9\]"):
        cache.advance([0, 1], [2, 1])


@torch.no_grad()
@pytest.mark.parametrize("local_filter", ["none", "two_convolutions_norm"])
def test_greedy_takes_the_likeliest_token_of_the_full_forward(local_filter: str) -> None:
    model = random_model(small_config(local_filter=local_filter))
    outputs = generate(model, PROMPTS, 7)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        text = list(prompt)
        for _ in range(7):
            text.append(int(full_logits(model, text)[-1].argmax()))
        assert text[len(prompt) :] == output


def test_stops_at_the_end_of_document() -> None:
    model = random_model(small_config())
    free = generate(model, PROMPTS, 12, temperature=1.0, seed=1)
    eod = free[2][4]
    stopped = generate(model, PROMPTS, 12, temperature=1.0, seed=1, eod_id=eod)
    for whole, output in zip(free, stopped, strict=True):
        length = whole.index(eod) + 1 if eod in whole else 12
        assert output == whole[:length]
    assert len(stopped[2]) <= 5
    assert any(len(output) > len(stopped[2]) for output in stopped)


def test_companions_do_not_change_a_sequence() -> None:
    model = random_model(small_config())
    outputs = generate(model, PROMPTS, 9, temperature=1.3, top_p=0.9, seed=4)
    other = generate(model, [PROMPTS[0], [50, 51, 52, 53], PROMPTS[2]], 9, temperature=1.3, top_p=0.9, seed=4)
    assert (outputs[0], outputs[2]) == (other[0], other[2])
    assert outputs[1] != other[1]
    again = generate(model, PROMPTS, 9, temperature=1.3, top_p=0.9, seed=5)
    assert again != outputs
    twins = generate(model, [PROMPTS[2]] * 2, 9, temperature=1.3, seed=4)
    assert twins[0] != twins[1]


def test_sampling_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    draws = (torch.arange(1000) + 0.5) / 1000
    logits = probabilities.log().expand(1000, 4)

    def counts(temperature: float, top_p: float) -> list[int]:
        return sample(logits, draws, temperature, top_p).bincount(minlength=4).tolist()

    assert counts(1.0, 1.0) == [100, 400, 200, 300]
    assert counts(1.0, 0.65) == [0, 571, 0, 429]  # 0.4 alone is not enough, 0.4 + 0.3 is
    assert counts(1.0, 0.3) == [0, 1000, 0, 0]  # the likeliest token always stays
    assert counts(0.5, 1.0) == [33, 533, 134, 300]  # 0.01, 0.16, 0.04, 0.09 of 0.3
    assert counts(0.0, 1.0) == counts(1e-45, 1.0) == [0, 1000, 0, 0]


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 1.0])
def test_sampling_never_leaves_the_allowed_tokens(draw: float, top_p: float) -> None:
    logits = torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = -torch.inf
    chosen = sample(logits, torch.full((50,), draw), 1.0, top_p)
    assert (chosen != 7).all()
    if draw == 0:
        assert torch.equal(chosen, logits.argmax(-1))


def test_nothing_to_do() -> None:
    model = random_model(small_config())
    assert generate(model, [], 5) == []
    assert generate(model, PROMPTS, 0) == [[], [], [], []]


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([[1], []], {}, DataError, "prompt 1 is empty"),
        ([[1, 97]], {}, DataError, "token 97 .* 97"),
        ([[-1, 3]], {}, DataError, "token -1"),
        ([[1]], {"temperature": -1.0}, ConfigError, "temperature -1.0"),
        ([[1]], {"top_p": 0.0}, ConfigError, "top_p 0.0"),
        ([[1]], {"top_p": 1.5}, ConfigError, "top_p 1.5"),
        ([[1]], {"max_new_tokens": -2}, ConfigError, "max_new_tokens -2"),
    ],
)
def test_bad_requests(
    prompts: list[list[int]], options: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(random_model(small_config()), prompts, **{"max_new_tokens": 3, **options})  # type: ignore[arg-type]
