"""ProcessGroupHCCL on the emulated HCCL: all checks of a world size run in the same processes, started once."""

import os
import re
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pangu.device.cann_emulator import Emulator, emulated_npu, install

pytestmark = [
    pytest.mark.ascend,
    pytest.mark.skipif(find_spec("torch_npu") is None, reason="torch_npu is not installed"),
]


# ---- checks: functions of (emulator, rank, world_size) that every rank runs, in this order


def check_all_reduce(emulator: Emulator, rank: int, size: int) -> None:
    parts = torch.arange(1, 1 + 5 * size).reshape(size, 5) % 7 - 2
    operations = {
        dist.ReduceOp.SUM: parts.sum(0),
        dist.ReduceOp.PRODUCT: parts.prod(0),
        dist.ReduceOp.MAX: parts.amax(0),
        dist.ReduceOp.MIN: parts.amin(0),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8):
        for operation, expected in operations.items():
            tensor = parts[rank].to(dtype).npu()
            dist.all_reduce(tensor, operation)
            assert torch.equal(tensor.cpu(), expected.to(dtype)), (dtype, operation)
    tensor = parts[rank].float().npu()
    dist.all_reduce(tensor, dist.ReduceOp.AVG)
    torch.testing.assert_close(tensor.cpu(), parts.float().mean(0))


def check_messages_larger_than_a_channel(emulator: Emulator, rank: int, size: int) -> None:
    tensor = torch.arange(1_500_000.0).npu() + rank
    dist.all_reduce(tensor)
    assert torch.equal(tensor.cpu(), torch.arange(1_500_000.0) * size + size * (size - 1) / 2)


def check_gathers_and_scatters(emulator: Emulator, rank: int, size: int) -> None:
    own = torch.tensor([rank, rank + 0.5]).npu()
    gathered = torch.empty(2 * size).npu()
    dist.all_gather_into_tensor(gathered, own)
    everything = torch.tensor([[r, r + 0.5] for r in range(size)])
    assert torch.equal(gathered.cpu(), everything.flatten())

    pieces = [torch.empty(2).npu() for _ in range(size)]
    dist.all_gather(pieces, own)
    assert torch.equal(torch.stack(pieces).cpu(), everything)

    piece = torch.empty(2).npu()
    dist.reduce_scatter_tensor(piece, gathered)
    assert torch.equal(piece.cpu(), everything[rank] * size)

    dist.scatter(piece, list(everything.npu().unbind()) if rank == 0 else None, src=0)
    assert torch.equal(piece.cpu(), everything[rank])

    collected = [torch.empty(2).npu() for _ in range(size)] if rank == 1 else None
    dist.gather(own, collected, dst=1)
    if collected is not None:
        assert torch.equal(torch.stack(collected).cpu(), everything)


def check_broadcast_and_reduce(emulator: Emulator, rank: int, size: int) -> None:
    tensor = torch.full((3,), float(rank)).npu()
    dist.broadcast(tensor, src=1)
    assert tensor.cpu().tolist() == [1.0] * 3
    dist.reduce(tensor, dst=0)
    if rank == 0:
        assert tensor.cpu().tolist() == [float(size)] * 3
    objects: list = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(size)]


def check_all_to_all(emulator: Emulator, rank: int, size: int) -> None:
    received = torch.empty(size, dtype=torch.bfloat16).npu()
    dist.all_to_all_single(received, (torch.arange(size) + 10.0 * rank).bfloat16().npu())
    assert received.cpu().tolist() == [10.0 * r + rank for r in range(size)]
    # Rank r sends i + 1 elements to each rank i.
    received = torch.empty((rank + 1) * size).npu()
    sent = torch.full((size * (size + 1) // 2,), float(rank)).npu()
    dist.all_to_all_single(received, sent, [rank + 1] * size, [i + 1 for i in range(size)])
    assert received.cpu().tolist() == [float(r) for r in range(size) for _ in range(rank + 1)]


def check_messages(emulator: Emulator, rank: int, size: int) -> None:
    sent, received = torch.full((3,), float(rank)).npu(), torch.empty(3).npu()
    send = dist.P2POp(dist.isend, sent, (rank + 1) % size)
    receive = dist.P2POp(dist.irecv, received, (rank - 1) % size)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    assert received.cpu().tolist() == [float((rank - 1) % size)] * 3
    # Larger than a channel, so that the even ranks' receives have to come first.
    sent, received = torch.full((1_000_000,), float(rank)).npu(), torch.empty(1_000_000).npu()
    operations: list[Callable] = [lambda: dist.isend(sent, rank ^ 1), lambda: dist.irecv(received, rank ^ 1)]
    for work in [operation() for operation in (operations if rank % 2 else operations[::-1])]:
        work.wait()
    assert received.cpu().eq(rank ^ 1).all()


def check_overlapped_collectives(emulator: Emulator, rank: int, size: int) -> None:
    tensors = [torch.full((1000,), float(i)).npu() for i in range(20)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    product = torch.ones(64, 64).npu() @ torch.ones(64, 64).npu()
    for work in works:
        work.wait()
    assert [tensor[0].item() for tensor in tensors] == [float(i * size) for i in range(20)]
    assert product.eq(64).all().item()


def check_subgroups(emulator: Emulator, rank: int, size: int) -> None:
    groups = [dist.new_group(range(start, size, 2)) for start in range(2)]
    tensor = torch.tensor([float(rank)]).npu()
    dist.all_reduce(tensor, group=groups[rank % 2])
    assert tensor.item() == sum(range(rank % 2, size, 2))
    both = dist.new_group(range(size), backend="cpu:gloo,npu:hccl")
    for device in ("cpu", "npu"):
        tensor = torch.ones(2, device=device)
        dist.all_reduce(tensor, group=both)
        assert tensor.cpu().tolist() == [float(size)] * 2


def check_functional_collectives(emulator: Emulator, rank: int, size: int) -> None:
    from torch.distributed import _functional_collectives as functional

    own, group = torch.full((size, 2), float(rank)).npu(), dist.group.WORLD
    total = sum(range(size))
    assert functional.all_reduce(own, "sum", group).cpu().eq(total).all()
    gathered = functional.all_gather_tensor(own[:1], 0, group).cpu()
    assert gathered.tolist() == [[float(r)] * 2 for r in range(size)]
    assert functional.reduce_scatter_tensor(own, "sum", 0, group).cpu().tolist() == [[float(total)] * 2]
    exchanged = functional.all_to_all_single(own, None, None, group).cpu()
    assert exchanged.tolist() == [[float(r)] * 2 for r in range(size)]


def check_calls_are_recorded(emulator: Emulator, rank: int, size: int) -> None:
    tensor = torch.ones(2).npu()
    with emulator.record() as calls:
        dist.all_reduce(tensor)
    assert calls == [("hccl", "HcclAllReduce")]


def check_what_hccl_refuses(emulator: Emulator, rank: int, size: int) -> None:
    with pytest.raises(RuntimeError, match="Unsupported data type at::kDouble"):
        dist.all_reduce(torch.ones(2, dtype=torch.float64).npu().view(torch.float64))
    with pytest.raises(RuntimeError, match=r"Cannot use ReduceOp\.BAND with HCCL"):
        dist.all_reduce(torch.ones(2, dtype=torch.int32).npu(), dist.ReduceOp.BAND)
    with pytest.raises(RuntimeError, match="Tensors must be contiguous"):
        dist.all_reduce(torch.ones(3, 2).npu().t())


def check_matmuls_that_communicate(emulator: Emulator, rank: int, size: int) -> None:
    import torch_npu

    backend = dist.group.WORLD._get_backend(torch.device("npu"))
    name = backend.get_hccl_comm_name(rank)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * size, 256, generator=generator).bfloat16()
    weight = torch.randn(256, 12, generator=generator).bfloat16()
    close = {"atol": 0.2, "rtol": 0.05}
    with emulator.record() as calls:
        product, gathered = torch_npu.npu_all_gather_base_mm(
            x.chunk(size)[rank].npu(), weight.npu(), name, size, bias=None, gather_index=0, gather_output=True
        )
    assert [call.name for call in calls] == ["aclnnAllGatherMatmul"]
    assert torch.equal(gathered.cpu(), x)
    torch.testing.assert_close(product.cpu(), x @ weight, **close)

    # Every rank adds its multiple of the product.
    own = (x * (rank + 1)).npu()
    expected = (x.float() @ weight.float()) * sum(range(size + 1))
    with emulator.record() as calls:
        scattered = torch_npu.npu_mm_reduce_scatter_base(own, weight.npu(), name, size, reduce_op="sum", bias=None)
        reduced = torch_npu.npu_mm_all_reduce_base(own, weight.npu(), name, reduce_op="sum", bias=None)
    assert [call.name for call in calls] == ["aclnnMatmulReduceScatter", "aclnnMatmulAllReduce"]
    torch.testing.assert_close(scattered.float().cpu(), expected.chunk(size)[rank], atol=2, rtol=0.05)
    torch.testing.assert_close(reduced.float().cpu(), expected, atol=2, rtol=0.05)
    with pytest.raises(RuntimeError, match="world_size should be in"):
        torch_npu.npu_mm_reduce_scatter_base(own, weight.npu(), name, 3)
    with pytest.raises(RuntimeError, match=r"k = 8 is not in \[256, 65535\)"):
        torch_npu.npu_all_gather_base_mm(own[:, :8].contiguous(), weight[:8].npu(), name, size)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def train(model: nn.Module, batches: Tensor, group: dist.ProcessGroup | None) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in batches:  # [rows, 16]
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if group is not None:
            dist.all_reduce(loss, dist.ReduceOp.AVG, group)
        losses.append(loss.item())
    return losses


def check_fully_sharded_and_tensor_parallel_training(emulator: Emulator, rank: int, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(FeedForward(), FeedForward(), nn.Linear(16, 8))
    batches = torch.randn(3, 8, 16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = train(model, batches, None)

    model.load_state_dict(state)
    model.npu()
    shards = size // 2 if size > 2 else size
    mesh = init_device_mesh("npu", (shards, size // shards), mesh_dim_names=("dp", "tp"))
    for layer in list(model)[:2]:
        if size > shards:
            parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    own = batches.chunk(shards, dim=1)[mesh["dp"].get_local_rank()].npu()
    losses = train(model, own, mesh["dp"].get_group())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-6, rtol=1e-5)


CHECKS: dict[str, Callable[[Emulator, int, int], None]] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}
CONFIGURATIONS = {2: {"asynchronous": True}, 4: {"asynchronous": False}}


# ---- running them


def run_rank(rank: int, size: int, store: str, options: dict) -> dict[str, str]:
    """What failed on this rank, by the name of the check."""
    failures = {}
    with emulated_npu(**options) as emulator:
        torch.npu.set_device(rank)
        dist.init_process_group("hccl", store=dist.FileStore(store, size), rank=rank, world_size=size)
        for name, check in CHECKS.items():
            try:
                check(emulator, rank, size)
            except BaseException:
                failures[name] = f"rank {rank}:\n{traceback.format_exc()}"
        dist.destroy_process_group()
    return failures


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    """By world size: what failed, by the name of the check. Runs each world size once."""
    results: dict[int, dict[str, str]] = {}

    def run(size: int) -> dict[str, str]:
        if size not in results:
            store = str(tmp_path_factory.mktemp("store") / "store")
            with ProcessPoolExecutor(size, mp_context=get_context("spawn")) as pool:
                ranks = [pool.submit(run_rank, rank, size, store, CONFIGURATIONS[size]) for rank in range(size)]
                results[size] = {name: text for rank in ranks for name, text in rank.result().items()}
        return results[size]

    return run


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("size", CONFIGURATIONS)
def test_collectives(size: int, check: str, failures: Callable[[int], dict[str, str]]) -> None:
    assert failures(size).get(check) is None, failures(size)[check]


def fail_in_three_ways(rank: int, store: str) -> dict[str, str]:
    """The errors of a mismatch, of a rank that does not come, and of one that dies."""

    def error_of(collective: Callable[[], object]) -> str:
        with pytest.raises(RuntimeError) as error:
            collective()
        return str(error.value)

    errors = {}
    install()
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    tensor, groups = torch.ones(4).npu(), [dist.new_group([0, 1]) for _ in range(3)]
    for group in groups:
        dist.all_reduce(tensor, group=group)  # joins the ranks

    if rank == 0:
        errors["mismatch"] = error_of(lambda: dist.all_reduce(tensor, group=groups[0]))
        os.environ["HCCL_EXEC_TIMEOUT"] = "1"
        errors["absent"] = error_of(lambda: dist.all_reduce(tensor, group=groups[1]))
        os.environ["HCCL_EXEC_TIMEOUT"] = "300"
    else:
        error_of(lambda: dist.broadcast(tensor, src=1, group=groups[0]))

    dist.all_reduce(tensor, group=groups[2])
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    errors["dead"] = error_of(lambda: dist.all_reduce(tensor, group=groups[2]))
    assert time.monotonic() - start < 20
    return errors


def test_failures_end_the_wait_and_name_the_rank(tmp_path: Path) -> None:
    pools = [ProcessPoolExecutor(1, mp_context=get_context("spawn")) for _ in range(2)]
    surviving, dying = (pool.submit(fail_in_three_ways, rank, str(tmp_path / "s")) for rank, pool in enumerate(pools))
    errors = surviving.result(timeout=100)
    assert isinstance(dying.exception(timeout=10), BrokenProcessPool)
    assert re.search(
        r"rank 1 calls HcclBroadcast of 16 bytes .* where this rank expects HcclAllReduce of 8 bytes",
        errors["mismatch"],
    )
    assert re.search(r"HcclAllReduce: waited 1\.0+ s \(HCCL_EXEC_TIMEOUT\) for rank 1", errors["absent"])
    assert "HcclAllReduce: the process of rank 1 has ended" in errors["dead"]
    assert not list(Path("/dev/shm").glob("pangu-cann-emulator.*"))
    for pool in pools:
        pool.shutdown()
