import gc
from collections.abc import Iterator

import pytest
import torch
from pangu_kernels import embedding, large_memory, linear_cross_entropy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

LIKE = torch.empty(0)
SHAPE = (2**10, 2**13)


def empty(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return large_memory.empty(LIKE, shape, dtype)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    large_memory._kept.clear()
    yield
    large_memory._kept.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_is_an_ordinary_tensor(dtype: torch.dtype) -> None:
    x = empty((3, 2**23), dtype).fill_(2)
    assert (x.shape, x.dtype, x.is_contiguous()) == ((3, 2**23), dtype, True)
    assert x[-1, -1].item() == 2


def test_memory_of_a_dead_tensor_goes_to_the_next_of_its_size_and_of_a_living_one_to_nobody() -> None:
    first, second = empty().fill_(1), empty().fill_(2)
    part, address = first[3], first.data_ptr()
    del first
    third = empty().fill_(3)
    assert third.data_ptr() != address  # a view keeps it
    assert bool((part == 1).all())
    del part
    assert empty().data_ptr() == address
    assert bool((second == 2).all())


def test_what_fits_no_more_is_not_kept() -> None:
    x = empty()
    del x
    assert sum(map(len, large_memory._kept.values())) == 1
    x = empty((2**11, 2**13))
    assert not large_memory._kept
    del x


def test_small_ones_and_those_of_a_dry_run_are_left_to_pytorch() -> None:
    empty((2**10,))
    with FakeTensorMode():
        assert large_memory.empty(torch.empty(0), SHAPE, torch.float32).shape == SHAPE
    assert not large_memory._kept


def test_gradients_in_used_memory_equal_those_in_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 16, generator=generator, requires_grad=True)
    tokens = torch.randint(64, (4, 24), generator=generator)

    def train() -> list[Tensor]:
        found = []
        for _ in range(2):
            for micro_batch in tokens:
                loss, _ = linear_cross_entropy(embedding(micro_batch, weight), weight, micro_batch, chunk_size=8)
                loss.backward()
            assert weight.grad is not None
            found.append(weight.grad.clone())
            weight.grad = None
            gc.collect()
        return found

    expected = train()
    monkeypatch.setattr(large_memory, "LARGE", 1)
    actual = train()
    assert large_memory._kept
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
