"""Context parallelism equals one device: attention, filters and whole models, in a world of four processes."""

import copy
import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pangu_kernels
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from world import World

from pangu.config import ModelConfig
from pangu.data.batch import Batch
from pangu.errors import ConfigError
from pangu.model import Transformer, init_weights
from pangu.model.local_filter import Convolution, TwoConvolutions
from pangu.parallel.context import ContextParallel, Exchange, apply_context_parallel
from pangu.parallel.context_layout import partition, shard_batch

DOCUMENTS = {
    "one": [64],
    "resets": [5, 1, 30, 2, 7, 0, 3, 16],
    "short": [1, 2, 1, 3, 2, 2, 1, 4, 7, 1, 1, 1, 9, 2, 3, 5, 1, 1, 2, 3, 12],
    "two": [33, 31],
}
HEADS = ((4, 2), (3, 3), (4, 1))
EXCHANGES: tuple[Exchange, ...] = ("ring", "all_gather")
FILTERS = ("two_convolutions_norm", "two_convolutions", "convolution_2", "convolution_3", "convolution_7")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6}


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


# ---- what every rank runs


def group_of(size: int) -> dist.ProcessGroup:
    """This rank's group among the world's groups of neighbouring ranks."""
    group, _ = dist.new_subgroups(size)
    assert group is not None
    return group


def error(actual: Tensor, expected: Tensor) -> float:
    """Of the largest value."""
    assert actual.shape == expected.shape
    scale = expected.double().abs().max().item() if expected.numel() else 1.0
    return (actual.double() - expected.double()).abs().max().item() / max(scale, 1e-30) if expected.numel() else 0.0


def attention_and_gradients(attend: Callable[..., Any], inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, logsumexp = attend(*inputs)
    assert out.dtype == d_out.dtype
    assert not logsumexp.requires_grad
    return [out.detach(), logsumexp, *torch.autograd.grad(out, inputs, d_out)]


def attention_errors(
    size: int, exchange: Exchange, lengths: list[int], heads: tuple[int, int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[float, float]:
    """Of context parallelism and of one CPU in the same dtype, both against one CPU in fp64."""
    cu_seqlens = boundaries(lengths)
    inputs = [torch.randn(sum(lengths), count, 8).to(dtype) for count in (heads[0], heads[1], heads[1], heads[0])]

    def one_device(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return pangu_kernels.attention(q, k, v, cu_seqlens, cu_seqlens, 0.3)

    context = ContextParallel(group_of(size), exchange)
    rows = torch.from_numpy(partition(cu_seqlens, size).rows[context.rank])

    def spread(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return context.attention(q, k, v, cu_seqlens, cu_seqlens, 0.3)

    expected = attention_and_gradients(one_device, [x.double() for x in inputs[:3]], inputs[3].double())
    alone = attention_and_gradients(one_device, inputs[:3], inputs[3])
    shares = [x[rows].to(device) for x in inputs]
    together = attention_and_gradients(spread, shares[:3], shares[3])
    assert [x.dtype for x in together] == [x.dtype for x in alone]
    return (
        max(error(x.cpu(), y[rows]) for x, y in zip(together, expected, strict=True)),
        max(error(x, y) for x, y in zip(alone, expected, strict=True)),
    )


def model_config(local_filter: str, layers: int = 2) -> ModelConfig:
    return ModelConfig(
        vocab_size=61,
        hidden_size=24,
        num_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2 if local_filter == "none" else 4,
        head_dim=6,
        intermediate_size=32,
        local_filter=local_filter,  # type: ignore[arg-type]
    )


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    init_weights(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def random_batch(lengths: list[int]) -> Batch:
    """Positions restart with documents; some labels are missing and the others weigh differently."""
    tokens = torch.randint(61, (sum(lengths) + 1,))
    labels = tokens[1:].masked_fill(torch.rand(sum(lengths)) < 0.2, -100)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(tokens[:-1], labels, positions, boundaries(lengths), torch.rand(sum(lengths)))


def loss_and_gradients(model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    loss, token_loss = model.loss(batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens, batch.loss_weights)
    loss.backward()
    assert len(token_loss) == len(batch.tokens)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return loss.detach(), grads


def model_errors(
    size: int, exchange: Exchange, lengths: list[int], local_filter: str, device: str = "cpu"
) -> dict[str, float]:
    """Of the loss and of each parameter's gradient, summed over ranks."""
    batch = random_batch(lengths)
    model = random_model(model_config(local_filter))
    spread = copy.deepcopy(model).to(device)
    group = group_of(size)
    apply_context_parallel(spread, group, exchange)
    expected_loss, expected = loss_and_gradients(model, batch)
    loss, grads = loss_and_gradients(spread, shard_batch(batch, dist.get_rank(group), size).to(device))
    for tensor in (loss, *grads.values()):
        dist.all_reduce(tensor, group=group)
    errors = {name: error(grads[name].cpu(), expected[name]) for name in expected}
    return {"loss": error(loss.cpu(), expected_loss), **errors}


def halo_traffic(size: int, lengths: list[int]) -> tuple[int, int]:
    """Rows that a filter's exchange moved, and those that it had to: found token by token."""
    with Calls() as calls:
        model_errors(size, "ring", lengths, "two_convolutions")
    received = next(args[0] for name, args in calls.seen if name == "c10d.alltoall_base_.default")
    owner = torch.empty(sum(lengths), dtype=torch.int64)
    for rank, rows in enumerate(partition(boundaries(lengths), size).rows):
        owner[torch.from_numpy(rows)] = rank
    rank = dist.get_rank() % size
    starts = boundaries(lengths).tolist()
    needed = set()
    for document, length in zip(starts, lengths, strict=False):
        for token in range(document, document + length):
            before = range(max(document, token - 2), token)
            needed |= {row for row in before if owner[token] == rank and owner[row] != rank}
    return len(received), len(needed)


def refuse_generation() -> str:
    context = ContextParallel(group_of(2), "ring")
    q, k = torch.randn(2, 2, 1, 8)
    with pytest.raises(ConfigError) as raised:
        context.attention(q, k, k, boundaries([2]), boundaries([2]), 1.0)
    return str(raised.value)


# ---- equality


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_attention_equals_one_device(
    size: int, exchange: Exchange, documents: str, dtype: torch.dtype, worlds: Callable[[int], World]
) -> None:
    for heads in HEADS:
        errors = worlds(max(4, size)).run(attention_errors, size, exchange, DOCUMENTS[documents], heads, dtype)
        assert max(together for together, _ in errors) < TOLERANCES[dtype], (heads, errors)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_attention_in_bf16_is_as_exact_as_on_one_device(exchange: Exchange, worlds: Callable[[int], World]) -> None:
    errors = worlds(4).run(attention_errors, 4, exchange, DOCUMENTS["resets"], (4, 2), torch.bfloat16)
    together, alone = (max(values) for values in zip(*errors, strict=True))
    assert together < 1.5 * alone < 0.05


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_model_equals_one_device(
    size: int, exchange: Exchange, documents: str, worlds: Callable[[int], World]
) -> None:
    for errors in worlds(max(4, size)).run(model_errors, size, exchange, DOCUMENTS[documents], "none"):
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("local_filter", FILTERS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_filters_see_across_ranks(documents: str, local_filter: str, worlds: Callable[[int], World]) -> None:
    for size in (2, 4):
        for errors in worlds(4).run(model_errors, size, "ring", DOCUMENTS[documents], local_filter):
            assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
def test_filters_see_across_eight_ranks(worlds: Callable[[int], World]) -> None:
    for lengths in DOCUMENTS.values():
        for errors in worlds(8).run(model_errors, 8, "all_gather", lengths, "two_convolutions_norm"):
            assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_only_the_rows_of_a_halo_are_exchanged(documents: str, worlds: Callable[[int], World]) -> None:
    traffic = worlds(4).run(halo_traffic, 4, DOCUMENTS[documents])
    assert all(moved == needed for moved, needed in traffic)
    assert sum(moved for moved, _ in traffic) > 0


def test_generation_with_a_cache_is_refused(worlds: Callable[[int], World]) -> None:
    assert set(worlds(4).run(refuse_generation)) == {
        "generation with a cache has no context-parallel form; set parallel.cp to 1"
    }


@pytest.mark.ascend
@pytest.mark.skipif(find_spec("torch_npu") is None, reason="torch_npu is not installed")
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_emulated_npus_equal_one_cpu(exchange: Exchange, documents: str, worlds: Callable[..., World]) -> None:
    """With torch_npu's fused attention, and hccl."""
    world, lengths = worlds(4, "npu"), DOCUMENTS[documents]
    for size in (2, 4):
        errors = world.run(attention_errors, size, exchange, lengths, (4, 2), torch.float32, "npu")
        assert max(together for together, _ in errors) < TOLERANCES[torch.float32]
    for model in world.run(model_errors, 4, exchange, lengths, "two_convolutions_norm", "npu"):
        assert max(model.values()) < 1e-5, model


# ---- without devices or a network


class Calls(TorchDispatchMode):
    """Collectives and operators of ours, in their order, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "pangu"):
            self.seen.append((str(func), args))
        return func(*args, **(kwargs or {}))

    def names(self) -> list[str]:
        return [name.removesuffix(".default") for name, _ in self.seen]

    def sent_bytes(self) -> int:
        """Of messages to a neighbour."""
        return sum(args[0][0].nbytes for name, args in self.seen if name == "c10d.send.default")


@pytest.fixture
def fake_group() -> Iterator[dist.ProcessGroup]:
    """Rank 2 of 4 ranks that do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("local_filter", ["none", "two_convolutions_norm"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_runs_on_fake_tensors_with_real_boundaries(
    exchange: Exchange, local_filter: str, fake_group: dist.ProcessGroup
) -> None:
    cu_seqlens = boundaries(DOCUMENTS["resets"])
    with FakeTensorMode():
        model = Transformer(model_config(local_filter))
        model.compute_dtype = torch.bfloat16
        apply_context_parallel(model, fake_group, exchange)
        tokens, positions = torch.zeros(2, 64, dtype=torch.int64)
        batch = shard_batch(Batch(tokens, tokens, positions, cu_seqlens), 2, 4)
        assert batch.tokens.shape == (16,)
        _, grads = loss_and_gradients(model, batch)
        assert all(grads[name].shape == parameter.shape for name, parameter in model.named_parameters())


def test_the_next_block_is_on_its_way_while_one_is_computed(fake_group: dist.ProcessGroup) -> None:
    """Rank 2 of 4: blocks of ranks 1, 0 and 3 come. Each exchange is started before the computation beside it."""
    exchange = ["c10d.send", "c10d.recv_"]
    cu_seqlens = boundaries([64])
    with FakeTensorMode():
        context = ContextParallel(fake_group, "ring")
        q = torch.empty(16, 4, 8, dtype=torch.bfloat16, requires_grad=True)
        k, v = torch.empty(2, 16, 2, 8, dtype=torch.bfloat16, requires_grad=True).unbind()
        with Calls() as forward:
            out, _ = context.attention(q, k, v, cu_seqlens, cu_seqlens, 1.0)
        with Calls() as backward:
            out.sum().backward()
    block = 2 * 16 * 2 * 8  # keys and values of two heads of 8
    assert forward.names() == [*exchange, "pangu.attention"] * 3 + ["pangu.attention"]
    assert forward.sent_bytes() == 3 * block * 2

    compute = "pangu.attention_backward"
    assert backward.names() == [
        *(*exchange, compute),  # own keys; block 1 comes
        *(*exchange, compute, *exchange),  # block 1; block 0 comes, then the gradient of 1 leaves and that of 0 comes
        *(*exchange, compute, *exchange),  # block 0; block 3 comes, then the gradient of 0 leaves and that of 3 comes
        *(compute, *exchange),  # block 3; then its gradient goes home and that of 2 comes home
    ]
    assert backward.sent_bytes() == 3 * block * (2 + 4)


def test_a_filter_without_bounds_is_refused(fake_group: dist.ProcessGroup) -> None:
    model = Transformer(model_config("exponential_moving_average"))
    with pytest.raises(ConfigError, match=r"model.local_filter 'exponential_moving_average' .* set parallel.cp to 1"):
        apply_context_parallel(model, fake_group, "ring")


def test_one_rank_changes_nothing(fake_group: dist.ProcessGroup) -> None:
    model = Transformer(model_config("two_convolutions", layers=1))
    alone = dist.new_group([2], use_local_synchronization=True)
    before = [vars(module).copy() for module in model.modules()]
    apply_context_parallel(model, alone, "ring")
    assert [vars(module) for module in model.modules()] == before


@pytest.mark.parametrize("local_filter", FILTERS)
def test_every_filter_is_given_its_halo(local_filter: str, fake_group: dist.ProcessGroup) -> None:
    model = Transformer(model_config(local_filter, layers=1))
    (module,) = (m for m in model.modules() if isinstance(m, TwoConvolutions | Convolution))
    before = module.convolve
    apply_context_parallel(model, fake_group, "ring")
    assert module.convolve is not before
