"""Data parallelism in half precision, on one process: gradients are those that were never sharded."""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pangu import config as configuration
from pangu.model import Transformer, init_weights
from pangu.model.linear import Linear
from pangu.parallel.data import apply_fsdp, set_last_micro_batch
from pangu.parallel.layout import make_layout
from pangu.parallel.mesh import make_mesh

# Norm gains of pre-norm are 1, exact in bf16, so that both models compute the same to the bit.
CONFIG = configuration.load("debug", ["--model.norm_placement", "pre", "--model.num_layers", "2"])


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> Transformer:
    built = Transformer(CONFIG.model)
    init_weights(built, seed=0)
    built.compute_dtype = torch.bfloat16
    return built


def batch(index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream = torch.randint(CONFIG.model.vocab_size, (65,), generator=torch.Generator().manual_seed(index))
    return stream[:-1], stream[1:], torch.arange(64), torch.tensor([0, 64], dtype=torch.int32)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_no_micro_batchs_gradient_is_rounded_to_bf16(zero_stage: Literal[1, 2, 3]) -> None:
    plain, sharded = model(), model()
    apply_fsdp(sharded, make_mesh(make_layout(CONFIG, 1), "cpu"), zero_stage)
    for index in range(3):
        set_last_micro_batch(sharded, index == 2, zero_stage)
        for one in (plain, sharded):
            loss, _ = one.loss(*batch(index))
            loss.backward()
    gradients = {name: parameter.grad.to_local() for name, parameter in sharded.named_parameters()}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    linear = [
        f"{name}.weight" for name, module in plain.layers.named_modules(prefix="layers") if isinstance(module, Linear)
    ]
    assert len(linear) == 2 * 5
    for name in linear:
        assert torch.equal(gradients[name], plain.get_parameter(name).grad), name
