"""Every schedule gives the loss and the gradients of one device, with uneven stages and documents of all lengths."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pangu_kernels.deferred import Deferred
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from world import World

from pangu.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
    RecomputeConfig,
    TrainConfig,
    load,
)
from pangu.data.batch import IGNORED_LABEL, Batch
from pangu.errors import ConfigError
from pangu.model import Transformer, generate, init_weights
from pangu.model.linear import Linear
from pangu.parallel.data import apply_fsdp
from pangu.parallel.layout import make_layout
from pangu.parallel.mesh import make_mesh
from pangu.parallel.pipeline import Pipeline, TiedEmbedding, split
from pangu.parallel.recompute import apply_recompute
from pangu.plan.simulate import schedule_order

Worlds = Callable[[int], World]

VOCAB_SIZE = 53
UNEVEN = {
    "1f1b": (2, 1, 3, 1),
    "interleaved_1f1b": (1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1),
    "interleaved_zero_bubble": (1, 2, 1, 1, 2, 1, 1, 1),
    "zero_bubble_v": (1, 2, 1, 1, 2, 1, 1, 1),
    "dualpipe_v": (2, 1, 1, 1, 1, 1, 2, 1),
}
DOCUMENTS = [[32], [1, 30, 1], [5, 11, 16], [2] * 16, [31, 1], [20, 12], [7, 7, 7, 7, 4], [1] * 32, [16, 16]]


def make_config(
    schedule: str,
    pp: int = 4,
    model: dict[str, Any] | None = None,
    layers: tuple[int, ...] | None = None,
    **parallel: Any,
) -> Config:
    layers = layers or UNEVEN[schedule]
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return Config(
        model=ModelConfig(**{**sizes, "num_layers": sum(layers), **(model or {})}),
        data=DataConfig(synthetic=True),
        phases=(PhaseConfig(name="only", sequence_length=32, batch_size=48, learning_rate=1e-3),),
        train=TrainConfig(steps=1),
        parallel=ParallelConfig(
            pp=pp,
            pipeline_schedule=schedule,  # type: ignore[arg-type]
            pipeline_layers=layers,
            pipeline_stages_per_rank=len(layers) // pp,
            **parallel,
        ),
    )


def make_batches(count: int, length: int = 32) -> list[Batch]:
    """Micro-batches that differ in everything but their length."""
    batches = []
    for index in range(count):
        source = torch.Generator().manual_seed(index)
        lengths = torch.tensor(DOCUMENTS[index % len(DOCUMENTS)]) * length // 32
        tokens = torch.randint(VOCAB_SIZE, (length,), generator=source)
        batches.append(
            Batch(
                tokens=tokens,
                labels=tokens.roll(-1).masked_fill(torch.rand(length, generator=source) < 0.2, IGNORED_LABEL),
                position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()]),
                cu_seqlens=torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32),
                loss_weights=torch.rand(length, generator=source) if index % 2 else None,
            )
        )
    return batches


def whole_model(config: Config, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(config.model)
    init_weights(model, 0)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):  # so that no gain is the same everywhere
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    model.compute_dtype = dtype
    return model


def make_pipeline(config: Config, whole: Transformer) -> tuple[Pipeline, TiedEmbedding]:
    layout = make_layout(config, dist.get_world_size())
    mesh = make_mesh(layout, "cpu")
    with torch.device("meta"):
        empty = Transformer(config.model)
    empty.compute_dtype = whole.compute_dtype
    rank = mesh.coordinates["pp"]
    parts = [split(empty, layout, stage) for stage in layout.stages_of(rank)]
    apply_recompute(parts, config.parallel.recompute, rank)
    values = dict(whole.named_parameters())
    for part in parts:
        if layout.dp > 1:
            apply_fsdp(part, mesh, config.parallel.zero_stage)
        part.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                value = values[name].detach()
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)
    return Pipeline(parts, mesh, config), TiedEmbedding(parts, mesh)


def one_device(model: Transformer, batches: Sequence[Batch]) -> torch.Tensor:
    total = torch.zeros(())
    for batch in batches:
        loss_sum, _ = model.loss(batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens, batch.loss_weights)
        loss_sum.backward()
        total += loss_sum.detach()
    return total


def check_step(pipeline: Pipeline, tied: TiedEmbedding, whole: Transformer, batches: Sequence[Batch]) -> None:
    """One step's loss and gradients; those of the parts accumulate on what is there, as those of the whole do."""
    expected = one_device(whole, [batch.scaled(1 / 700) for batch in batches])
    loss = pipeline.forward_backward(batches, 1 / 700)
    tied.sum_gradients()
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if whole.compute_dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-4}
    torch.testing.assert_close(loss, expected, **tolerance)
    wanted = dict(whole.named_parameters())
    parameters: dict[str, torch.nn.Parameter] = {}
    for part in pipeline.parts.values():
        parameters |= dict(part.named_parameters())
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, wanted[name].grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
        parameter.grad = None
    for parameter in wanted.values():
        parameter.grad = None


def equals_one_device(config: Config, counts: Sequence[int], dtype: torch.dtype = torch.float32) -> list[str]:
    whole = whole_model(config, dtype)
    pipeline, tied = make_pipeline(config, whole)
    for count in counts:
        check_step(pipeline, tied, whole, make_batches(count))
    return [name for part in pipeline.parts.values() for name, _ in part.named_parameters()]


@pytest.mark.parametrize("schedule", UNEVEN)
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_equal_one_device(worlds: Worlds, schedule: str, tied: bool) -> None:
    """Three times: the number of micro-batches grows and falls back."""
    config = make_config(schedule, model={"tie_embeddings": tied})
    names = worlds(4).run(equals_one_device, config, (8, 12, 8))
    everything = [name for name, _ in whole_model(config).named_parameters()]
    assert sorted({name for rank in names for name in rank}) == sorted(everything)
    assert sum(map(len, names)) == len(everything) + tied  # the embedding is there twice


@pytest.mark.parametrize(
    ("schedule", "counts"),
    [
        ("1f1b", (4, 5)),
        ("interleaved_1f1b", (1, 3, 4, 10)),
        ("interleaved_zero_bubble", (1, 3, 4, 10)),
        ("zero_bubble_v", (1, 2, 7)),
        ("dualpipe_v", (8, 9)),
    ],
)
def test_numbers_of_micro_batches_that_the_layout_allows(
    worlds: Worlds, schedule: str, counts: tuple[int, ...]
) -> None:
    worlds(4).run(equals_one_device, make_config(schedule), counts)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zero_bubble_v"])
@pytest.mark.parametrize(
    ("model", "recompute"),
    [
        ({"local_filter": "two_convolutions_norm"}, RecomputeConfig(mode="selective")),
        ({"norm_placement": "pre", "num_key_value_heads": 1}, RecomputeConfig(mode="full", layers=(1,))),
        (
            {"attention_bias": True, "feed_forward_bias": True, "tie_embeddings": True},
            RecomputeConfig(mode=("full", "selective", "none", "full"), layers=(0, 1, 2, 3)),
        ),
    ],
)
def test_models_and_recomputation(
    worlds: Worlds, schedule: str, model: dict[str, Any], recompute: RecomputeConfig
) -> None:
    config = make_config(schedule, model=model, recompute=recompute)
    worlds(4).run(equals_one_device, config, (8,))
    worlds(4).run(equals_one_device, config, (8,), torch.bfloat16)


def evaluates_and_generates(config: Config) -> None:
    whole = whole_model(config)
    pipeline, tied = make_pipeline(config, whole)
    prompts = [[5], [7, 3], [2, 9, 4, 8, 1, 6, 11, 13, 10]]
    options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    for count, length in ((1, 64), (6, 32), (0, 32)):
        batches = make_batches(count, length)
        with torch.no_grad():
            expected = [
                whole.loss(b.tokens, b.labels, b.position_ids, b.cu_seqlens, b.loss_weights)[0] for b in batches
            ]
        assert pipeline.evaluate(batches) == pytest.approx(list(map(float, expected)), rel=1e-5)
        check_step(pipeline, tied, whole, make_batches(8, length))  # and training goes on
    assert pipeline.generate(prompts, 4) == generate(whole, prompts, 4)
    assert pipeline.generate(prompts, 4, **options) == generate(whole, prompts, 4, **options)


@pytest.mark.parametrize("schedule", UNEVEN)
@pytest.mark.parametrize("tied", [False, True])
def test_evaluation_and_generation(worlds: Worlds, schedule: str, tied: bool) -> None:
    """Between training steps, with fewer micro-batches than ranks too."""
    model = {"tie_embeddings": tied, "local_filter": "two_convolutions_norm"}
    worlds(4).run(evaluates_and_generates, make_config(schedule, model=model))


def tied_copies_after_an_update(config: Config) -> list[torch.Tensor]:
    pipeline, tied = make_pipeline(config, whole_model(config))
    pipeline.forward_backward(make_batches(8), 1.0)
    tied.sum_gradients()
    parameters: dict[str, torch.nn.Parameter] = {}
    for part in pipeline.parts.values():
        parameters |= dict(part.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    pipeline.evaluate(make_batches(1))
    tables = [part.embedding for part in pipeline.parts.values() if part.embedding is not None]
    assert tied.copies == ({"embedding.weight": 2} if len(tables) == 1 else {})
    return [table.weight.detach() for table in tables]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zero_bubble_v"])
def test_tied_copies_stay_equal(worlds: Worlds, schedule: str) -> None:
    """To the bit, when every parameter of a rank is updated once by its name."""
    ranks = worlds(4).run(tied_copies_after_an_update, make_config(schedule, model={"tie_embeddings": True}))
    first, last = (table for rank in ranks for table in rank)
    assert torch.equal(first, last)


def receive_buffers(config: Config) -> int:
    pipeline, _ = make_pipeline(config, whole_model(config))
    pipeline.forward_backward(make_batches(8), 1.0)
    ((_, stages),) = pipeline._plans.values()
    received = [infos for stage in stages for infos in (stage.args_recv_info, stage.grad_recv_info)]
    buffers = [item.buffer for infos in received for micro_batch in infos.values() for item in micro_batch]
    return sum(buffer is not None and buffer.device.type != "meta" for buffer in buffers)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe_v"])
def test_no_receive_buffer_outlives_its_use(worlds: Worlds, schedule: str) -> None:
    assert worlds(4).run(receive_buffers, make_config(schedule)) == [0, 0, 0, 0]


def deferred_gradients(config: Config) -> tuple[int, int, int]:
    """Weight gradients left for later, the most at one moment, and the linear layers' passes."""
    whole = whole_model(config)
    pipeline, tied = make_pipeline(config, whole)
    added = most = 0
    waiting: set[int] = set()

    class Watched(Deferred):
        def add(self, edge: Any, compute: Callable[[], torch.Tensor]) -> None:
            nonlocal added, most
            number = added = added + 1
            waiting.add(number)
            most = max(most, len(waiting))

            def computed() -> torch.Tensor:
                waiting.remove(number)
                return compute()

            super().add(edge, computed)

    linears = 0
    for stage, part in pipeline.parts.items():
        pipeline._deferred[stage] = Watched()
        for module in part.modules():
            if isinstance(module, Linear) and module.deferred is not None:
                module.deferred = pipeline._deferred[stage]
                linears += 1
    check_step(pipeline, tied, whole, make_batches(8))
    assert not waiting
    return added, most, linears * 8


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zero_bubble_v", "dualpipe_v"])
def test_weight_gradients_wait(worlds: Worlds, schedule: str) -> None:
    """Every one is left for later; on some rank those of several micro-batches are due at once."""
    ranks = worlds(4).run(deferred_gradients, make_config(schedule))
    assert all(added == passes > 0 for added, _, passes in ranks)
    assert any(most > passes / 8 for _, most, passes in ranks)


class Collectives(TorchDispatchMode):
    """Counts collectives of c10d by their operators' names."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def fully_sharded(config: Config, dtype: torch.dtype) -> tuple[float, float]:
    """Gathers and reductions per sharded module (a layer, or what a stage has outside of its layers) and step."""
    whole = whole_model(config, dtype)
    pipeline, _ = make_pipeline(config, whole)
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1e-3}
    batches = make_batches(2 * 8)
    expected = one_device(whole, [batch.scaled(1 / 700) for batch in batches])
    with Collectives() as watch:
        loss = pipeline.forward_backward(batches[dist.get_rank() % 2 :: 2], 1 / 700)
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / config.parallel.pp, expected, **tolerance)
    wanted = dict(whole.named_parameters())
    modules = 0
    for part in pipeline.parts.values():
        modules += len(part.layers) + (part.embedding is not None or part.norm is not None)
        for name, parameter in part.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            torch.testing.assert_close(2 * parameter.grad.full_tensor(), wanted[name].grad, **tolerance)
    return watch.calls["c10d::_allgather_base_"] / modules, watch.calls["c10d::_reduce_scatter_base_"] / modules


@pytest.mark.parametrize("schedule", UNEVEN)
def test_fully_sharded_parameters(worlds: Worlds, schedule: str) -> None:
    """FSDP means over ranks; ZeRO 1 gathers parameters and reduces gradients once per step, whatever the schedule."""
    layers = {"1f1b": (2, 1), "interleaved_1f1b": (1, 1, 2, 1, 1, 1, 1, 1)}.get(schedule, (1, 2, 1, 1))

    def config(zero_stage: int) -> Config:
        return make_config(schedule, pp=2, layers=layers, dp_shard=2, zero_stage=zero_stage)

    assert worlds(4).run(fully_sharded, config(1), torch.float32) == [(1, 1)] * 4
    assert worlds(4).run(fully_sharded, config(1), torch.bfloat16) == [(1, 1)] * 4
    ranks = worlds(4).run(fully_sharded, config(3), torch.float32)
    assert all(gathers > 2 and reductions == 1 for gathers, reductions in ranks)


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("schedule", UNEVEN)
def test_layouts_refuse_exactly_what_the_library_does(schedule: str, pp: int) -> None:
    stages = 1 if schedule == "1f1b" else 2
    refused = set()
    for count in range(1, 13):
        overrides = ["--parallel.pipeline_schedule", schedule, "--parallel.pipeline_stages_per_rank", str(stages)]
        overrides += ["--parallel.pp", str(pp), "--phases.0.batch_size", str(count), "--model.num_layers", "8"]
        config = load("debug", [*overrides, "--train.micro_batch_size", "1"])
        try:
            schedule_order(schedule, pp, stages, count)
        except ConfigError:
            refused.add(count)
            with pytest.raises(ConfigError, match=f"= {count} micro-batches"):
                make_layout(config, pp)
        else:
            make_layout(config, pp)
    assert bool(refused) == (schedule != "zero_bubble_v")


@pytest.mark.parametrize(
    ("recompute", "message"),
    [
        (RecomputeConfig(mode=("full", "none", "full")), "recompute.mode has 3 entries for parallel.pp 4"),
        (RecomputeConfig(mode="full", layers=(1, 2)), "recompute.layers has 2 entries for parallel.pp 4"),
        (RecomputeConfig(mode="full", layers=(-1,)), r"recompute.layers \[-1\] must not be negative"),
    ],
)
def test_bad_recomputation(recompute: RecomputeConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_layout(make_config("1f1b", recompute=recompute), 4)
