"""Recomputation gives the same bits, keeps less, and computes only what it says it does."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import pangu_kernels
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from world import World

from pangu.config import ModelConfig, RecomputeConfig, load
from pangu.model import Transformer, generate, init_weights
from pangu.parallel.layout import make_layout
from pangu.parallel.model import build_model
from pangu.parallel.recompute import apply_recompute
from pangu.train.statistics import LayerStatistics

Mode = Literal["none", "selective", "full"]

CUT = torch.tensor([0, 5, 29, 30, 64], dtype=torch.int32)
TOKENS = torch.randint(61, (64,), generator=torch.Generator().manual_seed(1))
LABELS = TOKENS.roll(-1)
POSITIONS = torch.cat([torch.arange(length) for length in CUT.diff().tolist()])


def build(
    recompute: RecomputeConfig, pp_rank: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Transformer:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_layers": 4, "num_attention_heads": 4, "intermediate_size": 80}
    model = Transformer(ModelConfig(**{**sizes, **changes}))
    init_weights(model, 0)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):  # so that no gain is the same everywhere
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    model.compute_dtype = dtype
    apply_recompute([model], recompute, pp_rank)
    return model


def loss(model: Transformer) -> Tensor:
    return model.loss(TOKENS, LABELS, POSITIONS, CUT)[0]


class Watch(TorchDispatchMode):
    """Counts operators, and how many bytes of what they have allocated are still alive."""

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.name().removeprefix("aten::")] += 1
        for tensor in result if isinstance(result, tuple) else (result,):
            if type(tensor) is Tensor and tensor.untyped_storage().data_ptr() not in self._existing:
                storage = tensor.untyped_storage()
                self._storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def live_bytes(self) -> int:
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def kept_bytes(model: Transformer) -> int:
    """Between the forward and the backward pass of the layers, beside their output."""
    cos, sin = torch.rand(2, 64, model.config.head_dim)
    h = torch.randn(64, model.config.hidden_size, requires_grad=True)
    with Watch(cos, sin, h, *model.parameters()) as watch:
        for block in model.layers.values():
            h = block(h, cos, sin, CUT)
    return watch.live_bytes() - h.nbytes


VARIANTS = [
    pytest.param({}, id="sandwich"),
    pytest.param({"norm_placement": "pre", "num_key_value_heads": 2}, id="pre-norm-grouped"),
    pytest.param({"local_filter": "two_convolutions_norm", "tie_embeddings": True}, id="lfa-tied"),
    pytest.param({"attention_bias": True, "feed_forward_bias": True}, id="biases"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("changes", VARIANTS)
def test_the_same_bits_as_without(mode: Mode, changes: dict[str, Any], dtype: torch.dtype) -> None:
    expected = build(RecomputeConfig(), dtype=dtype, **changes)
    found = build(RecomputeConfig(mode=mode), dtype=dtype, **changes)
    for _ in range(2):  # gradients accumulate
        for model in (expected, found):
            loss(model).backward()
    assert torch.equal(loss(found), loss(expected))
    for (name, wanted), (_, parameter) in zip(expected.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(parameter.grad, wanted.grad), name


def test_names_and_inference_stay_as_they_are() -> None:
    plain, full = build(RecomputeConfig()), build(RecomputeConfig(mode="full"))
    assert [name for name, _ in full.named_parameters()] == [name for name, _ in plain.named_parameters()]
    with torch.no_grad(), Watch() as watch:
        assert torch.equal(full(TOKENS, POSITIONS, CUT), plain(TOKENS, POSITIONS, CUT))
    assert watch.calls["pangu::attention"] == 8
    prompts = [[1, 2, 3], [4]]
    assert generate(full, prompts, 5) == generate(plain, prompts, 5)


def test_what_is_kept() -> None:
    """In fp32 rows of H = 32 and F = 80 numbers: selective drops two norms' outputs and the activation's per layer."""
    row = 64 * 4
    none, selective, full = (kept_bytes(build(RecomputeConfig(mode=mode))) for mode in ("none", "selective", "full"))
    assert none - selective == 4 * (32 + 32 + 80) * row
    assert full == 3 * 32 * row  # the layers' inputs, of which the first is not theirs


def test_what_is_computed_again() -> None:
    def calls(mode: Mode) -> Counter[str]:
        total = loss(build(RecomputeConfig(mode=mode)))
        with Watch() as watch:
            total.backward()
        return watch.calls

    none, selective, full = calls("none"), calls("selective"), calls("full")
    again = {name for name in selective if selective[name] > none[name]} - {"detach"}
    assert again == {"pangu::rms_norm", "pangu::swiglu"}
    assert selective["pangu::rms_norm"] == 2 * 4
    assert selective["pangu::swiglu"] == 4
    assert full["pangu::attention"] == 4
    assert full["mm"] > none["mm"]


@pytest.mark.parametrize(
    ("recompute", "pp_rank", "layers"),
    [
        (RecomputeConfig(mode="full"), 1, 4),
        (RecomputeConfig(mode="full", layers=(1,)), 1, 1),
        (RecomputeConfig(mode="full", layers=(3, 2)), 1, 2),
        (RecomputeConfig(mode="full", layers=(3, 0)), 1, 0),
        (RecomputeConfig(mode=("none", "full")), 1, 4),
        (RecomputeConfig(mode=("none", "full")), 0, 0),
        (RecomputeConfig(mode=("selective", "full"), layers=(4, 3)), 1, 3),
    ],
)
def test_chosen_layers_of_a_rank(recompute: RecomputeConfig, pp_rank: int, layers: int) -> None:
    total = loss(build(recompute, pp_rank))
    with Watch() as watch:
        total.backward()
    assert watch.calls["pangu::attention"] == layers


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_nothing_stays_alive_without_backward(mode: Mode) -> None:
    model = build(RecomputeConfig(mode=mode))
    with Watch(TOKENS, LABELS, POSITIONS, CUT, *model.parameters()) as watch:
        loss(model)
    assert watch.live_bytes() == 0


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_layer_statistics_see_a_forward_pass_once(mode: Mode) -> None:
    model = build(RecomputeConfig(mode=mode))
    statistics = LayerStatistics([model])
    with statistics.record():
        loss(model).backward()
    assert len(statistics._outputs) == 2 * 4


def collectives_of_tensor_parallelism(mode: Mode) -> tuple[Counter[str], Counter[str]]:
    """Of a forward and of a backward pass."""
    overrides = ("--parallel.tp", "2", "--parallel.recompute.mode", mode, "--phases.0.sequence_length", "64")
    config = load(
        "debug", (*overrides, "--model.local_filter", "two_convolutions_norm", "--model.num_key_value_heads", "4")
    )
    model = build_model(config, make_layout(config, 2), torch.device("cpu"))
    with Watch() as forward:
        total, _ = model.parts[0].loss(TOKENS, LABELS, POSITIONS, CUT)
    with Watch() as backward:
        total.backward()
    return tuple(  # type: ignore[return-value]
        Counter({name: count for name, count in watch.calls.items() if name.startswith("_c10d_functional")})
        for watch in (forward, backward)
    )


def test_selective_communicates_nothing_again(worlds: Callable[[int], World]) -> None:
    none, selective, full = (
        worlds(2).run(collectives_of_tensor_parallelism, mode)[0] for mode in ("none", "selective", "full")
    )
    assert sum(none[1].values()) > 0
    assert selective == none
    assert full[0] == none[0]
    assert full[1] > none[1]


def test_a_norm_alone_computes_its_output_again() -> None:
    """In bf16 too, where the fused norm rounds the residual before it normalizes it."""
    for dtype in (torch.float32, torch.bfloat16):
        residual, y = torch.randn(2, 16, 32, dtype=dtype)
        gains = [nn.Parameter(torch.randn(32)) for _ in range(2)]
        _, normed = pangu_kernels.sandwich_norm(residual, y, *gains, 1e-5)
        assert normed is not None
        again: Any = normed.grad_fn
        with torch.no_grad():
            assert torch.equal(again.recompute[1](again), normed)
