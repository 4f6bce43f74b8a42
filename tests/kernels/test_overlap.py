"""Matmuls that communicate: every mode equals one device, on gloo and on emulated NPUs.

Checks are functions of a `World` that every rank runs; all those of a world size share its processes.
"""

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pangu_kernels.overlap import (
    all_gather_matmul,
    all_gather_rows,
    ascend,
    copy_to_group,
    cuda,
    matmul_reduce_scatter,
    modes,
    reduce_from_group,
    reduce_scatter_rows,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from pangu.device.cann_emulator import emulated_npu

ROWS = 8  # of a rank
DEPTH, WIDTHS = 256, (272, 256)  # MC2 takes no less than 256
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class World:
    group: dist.ProcessGroup
    device: str
    emulator: Any = None
    """Of the NPU."""

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def random(self, seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same numbers on every rank."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(self.device)

    def own(self, full: Tensor) -> Tensor:
        return full.chunk(self.size)[self.rank].clone()


def assert_same(actual: Tensor | None, expected: Tensor, dtype: torch.dtype, tolerance: float | None = None) -> None:
    """By the norm of the difference, so that rounding of sums that nearly cancel does not count."""
    assert actual is not None
    assert (actual.dtype, actual.shape) == (dtype, expected.shape)
    error = (actual.cpu().double() - expected).norm() / expected.norm()
    assert error <= (tolerance or TOLERANCE[dtype]), f"relative error {error:.1e}"


class Calls(TorchDispatchMode):
    """Names of the operators called, such as "mm" and "all_gather_into_tensor"; of others than these, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm_", "wait_tensor") or func.namespace == "_c10d_functional":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


# ---- the same computation on one device, in fp64


def wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True).requires_grad_()


def expected_all_gather_matmul(
    world: World, x: Tensor, weights: list[list[Tensor]], d_ys: list[list[Tensor]]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Products, d_x and d_weights of this rank, of all ranks' weights and output gradients (by rank, by weight)."""
    full = wide(x)
    wide_weights = [[wide(w.to(x.dtype)) for w in of_rank] for of_rank in weights]
    products = [[full @ w.t() for w in of_rank] for of_rank in wide_weights]
    for of_rank, d_of_rank in zip(products, d_ys, strict=True):
        torch.autograd.backward(of_rank, [d_y.cpu().double() for d_y in d_of_rank])
    assert full.grad is not None
    own = world.rank
    return (
        [y.detach() for y in products[own]],
        full.grad.chunk(world.size)[own],
        [w.grad for w in wide_weights[own] if w.grad is not None],
    )


def expected_matmul_reduce_scatter(
    world: World, xs: list[Tensor], weights: list[Tensor], d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows of the sum, d_x and d_weight, of all ranks' x and weights and the whole output's gradient."""
    wide_xs, wide_weights = [wide(x) for x in xs], [wide(w.to(xs[0].dtype)) for w in weights]
    total = torch.stack([x @ w.t() for x, w in zip(wide_xs, wide_weights, strict=True)]).sum(0)
    total.backward(d_y.cpu().double())
    d_x, d_weight = wide_xs[world.rank].grad, wide_weights[world.rank].grad
    assert d_x is not None
    assert d_weight is not None
    return total.detach().chunk(world.size)[world.rank], d_x, d_weight


# ---- checks


def compare_all_gather_matmul(world: World, dtype: torch.dtype, weight_dtype: torch.dtype, **options: Any) -> None:
    ranks, size = range(world.size), world.size
    x = world.random(0, ROWS * size, DEPTH, dtype=dtype)
    weights = [[world.random(10 * r + n, n, DEPTH, dtype=weight_dtype) for n in WIDTHS] for r in ranks]
    d_ys = [[world.random(10 * r + n + 1, ROWS * size, n, dtype=dtype) for n in WIDTHS] for r in ranks]
    products, d_x, d_weights = expected_all_gather_matmul(world, x, weights, d_ys)

    own_x = world.own(x).requires_grad_()
    own_weights = [w.requires_grad_() for w in weights[world.rank]]
    ys = all_gather_matmul(own_x, own_weights, world.group, **options)
    torch.autograd.backward(ys, d_ys[world.rank])
    for y, expected in zip(ys, products, strict=True):
        assert_same(y, expected, dtype)
    assert_same(own_x.grad, d_x, dtype)
    for weight, expected in zip(own_weights, d_weights, strict=True):
        assert_same(weight.grad, expected, weight_dtype)
    with torch.no_grad():
        for y, same in zip(ys, all_gather_matmul(own_x, own_weights, world.group, **options), strict=True):
            assert torch.equal(y, same)


def compare_matmul_reduce_scatter(world: World, dtype: torch.dtype, weight_dtype: torch.dtype, **options: Any) -> None:
    ranks, size, width = range(world.size), world.size, WIDTHS[0]
    xs = [world.random(r, ROWS * size, DEPTH, dtype=dtype) for r in ranks]
    weights = [world.random(50 + r, width, DEPTH, dtype=weight_dtype) for r in ranks]
    d_y = world.random(99, ROWS * size, width, dtype=dtype)
    y, d_x, d_weight = expected_matmul_reduce_scatter(world, xs, weights, d_y)

    own_x, own_weight = xs[world.rank].requires_grad_(), weights[world.rank].requires_grad_()
    own_y = matmul_reduce_scatter(own_x, own_weight, world.group, **options)
    own_y.backward(world.own(d_y))
    assert_same(own_y, y, dtype)
    assert_same(own_x.grad, d_x, dtype)
    assert_same(own_weight.grad, d_weight, weight_dtype)
    with torch.no_grad():
        assert torch.equal(own_y, matmul_reduce_scatter(own_x, own_weight, world.group, **options))


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PRECISIONS = ((FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32))


def check_reference_equals_one_device(world: World) -> None:
    for precision in PRECISIONS:
        compare_all_gather_matmul(world, *precision, mode="reference")
        compare_matmul_reduce_scatter(world, *precision, mode="reference")


def check_chunked_equals_one_device(world: World) -> None:
    for precision, num_chunks in product(PRECISIONS, (1, 4, ROWS)):
        compare_all_gather_matmul(world, *precision, mode="chunked", num_chunks=num_chunks)
        compare_matmul_reduce_scatter(world, *precision, mode="chunked", num_chunks=num_chunks)


def check_gathered_rows_can_be_kept(world: World) -> None:
    for mode in ("reference", "chunked"):
        compare_all_gather_matmul(world, FP32, FP32, mode=mode, keep_gathered=True)
        x = world.random(0, ROWS, DEPTH).requires_grad_()
        weight = world.random(1, 4, DEPTH).requires_grad_()
        (y,) = all_gather_matmul(x, [weight], world.group, mode=mode, keep_gathered=True)
        with Calls() as calls:
            y.backward(torch.ones_like(y))
        assert "all_gather_into_tensor" not in calls.names


def check_subgroups(world: World) -> None:
    if world.size < 4:
        return
    half = world.size // 2
    groups = [dist.new_group(range(start, start + half)) for start in (0, half)]
    part = World(groups[world.rank // half], world.device, world.emulator)
    assert (part.size, part.rank) == (half, world.rank % half)
    compare_all_gather_matmul(part, FP32, FP32, mode="chunked")
    compare_matmul_reduce_scatter(part, FP32, FP32, mode="chunked")


def check_only_needed_gradients_are_computed(world: World) -> None:
    for mode in ("reference", "chunked"):
        for x_needs, weight_needs in product((False, True), repeat=2):
            x = world.random(0, ROWS, DEPTH, dtype=FP32).requires_grad_(x_needs)
            full = world.random(1, ROWS * world.size, DEPTH).requires_grad_(x_needs)
            weight = world.random(2, 12, DEPTH).requires_grad_(weight_needs)
            (gathered_y,) = all_gather_matmul(x, [weight], world.group, mode=mode)
            y = matmul_reduce_scatter(full, weight, world.group, mode=mode)
            assert y.requires_grad == gathered_y.requires_grad == (x_needs or weight_needs)
            if not y.requires_grad:
                continue
            with Calls() as calls:
                gathered_y.backward(torch.ones_like(gathered_y))
            communicated = [name for name in calls.names if name not in ("mm", "wait_tensor")]
            expected = ["all_gather_into_tensor"] * weight_needs + ["reduce_scatter_tensor"] * x_needs
            assert communicated == expected
            assert calls.names.count("mm") == x_needs + weight_needs
            with Calls() as calls:
                y.backward(torch.ones_like(y))
            pieces = 4 if mode == "chunked" and x_needs else 1
            assert calls.names.count("all_gather_into_tensor") == pieces
            assert calls.names.count("mm") == x_needs * pieces + weight_needs
            assert ((x.grad is None, full.grad is None), weight.grad is None) == ((not x_needs,) * 2, not weight_needs)


def check_gradients_of_micro_batches_are_added(world: World) -> None:
    for dtype in (FP32, BF16):
        x = world.random(0, ROWS, DEPTH, dtype=dtype)
        full = world.random(1, ROWS * world.size, DEPTH, dtype=dtype)
        weights = [world.random(n, n, DEPTH).requires_grad_() for n in WIDTHS]
        once: list[Tensor] = []
        for _ in range(2):
            ys = all_gather_matmul(x, weights, world.group)
            y = matmul_reduce_scatter(full, weights[0], world.group)
            torch.autograd.backward([*ys, y], [each.detach() for each in (*ys, y)])
            once = once or [w.grad.clone() for w in weights if w.grad is not None]
        for weight, gradient in zip(weights, once, strict=True):
            torch.testing.assert_close(weight.grad, 2 * gradient)


def check_pieces_are_communicated_while_others_are_multiplied(world: World) -> None:
    gather, scatter, mm, wait = "all_gather_into_tensor", "reduce_scatter_tensor", "mm", "wait_tensor"
    x = world.random(0, ROWS, DEPTH).requires_grad_()
    full = world.random(1, ROWS * world.size, DEPTH).requires_grad_()
    weights = [world.random(seed, 8, DEPTH).requires_grad_() for seed in (2, 3)]
    with Calls() as calls:
        ys = all_gather_matmul(x, weights, world.group, mode="chunked", num_chunks=4)
    assert calls.names == [gather] + [wait, gather, mm, mm] * 3 + [wait, mm, mm]
    with Calls() as calls:
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert calls.names == [gather, mm, "addmm_", scatter, wait, mm, mm, wait]
    with Calls() as calls:
        y = matmul_reduce_scatter(full, weights[0], world.group, mode="chunked", num_chunks=4)
    assert calls.names == [mm, scatter] * 4 + [wait] * 4
    with Calls() as calls:
        y.backward(torch.ones_like(y))
    assert calls.names == [gather] + [wait, gather, mm] * 3 + [wait, mm] + [mm]


def check_collectives_and_their_gradients(world: World) -> None:
    size = world.size
    full, d_full = world.random(0, 2 * size, 3), world.random(1, 2 * size, 3)
    parts = [world.random(10 + r, 2 * size, 3) for r in range(size)]  # of each rank
    total = torch.stack(parts).sum(0)

    x = world.own(full).requires_grad_()
    y = all_gather_rows(x, world.group)
    assert torch.equal(y, full)
    y.backward(parts[world.rank])
    torch.testing.assert_close(x.grad, world.own(total))

    x = parts[world.rank].clone().requires_grad_()
    y = reduce_scatter_rows(x, world.group)
    torch.testing.assert_close(y, world.own(total))
    y.backward(world.own(d_full))
    assert torch.equal(x.grad, d_full)

    x = full.clone().requires_grad_()
    y = copy_to_group(x, world.group)
    assert torch.equal(y, full)
    y.backward(parts[world.rank])
    torch.testing.assert_close(x.grad, total)

    x = parts[world.rank].clone().requires_grad_()
    y = reduce_from_group(x, world.group)
    torch.testing.assert_close(y, total)
    y.backward(d_full)
    assert torch.equal(x.grad, d_full)
    assert torch.equal(x, parts[world.rank])

    with torch.no_grad():
        for function in (all_gather_rows, reduce_scatter_rows, copy_to_group, reduce_from_group):
            y = function(parts[world.rank].requires_grad_(), world.group)
            assert y.grad_fn is None


def check_auto_chooses_by_size(world: World) -> None:
    rows = modes.MIN_PIECE_BYTES // (4 * DEPTH)  # of one piece
    for num_rows, gathers in ((2 * rows, 2), (2 * rows - 2, 1), (2 * rows + 1, 1)):
        x = torch.ones(num_rows, DEPTH, device=world.device)
        weight = torch.ones(1, DEPTH, device=world.device)
        with Calls() as calls, torch.no_grad():
            all_gather_matmul(x, [weight], world.group, num_chunks=2)
        assert calls.names.count("all_gather_into_tensor") == gathers
    full = torch.ones(world.size * 2 * 64, 1, device=world.device)
    for width, scatters in ((modes.MIN_PIECE_BYTES // (4 * 64), 2), (modes.MIN_PIECE_BYTES // (4 * 64) - 1, 1)):
        with Calls() as calls, torch.no_grad():
            matmul_reduce_scatter(full, torch.ones(width, 1, device=world.device), world.group, num_chunks=2)
        assert calls.names.count("reduce_scatter_tensor") == scatters


def check_bad_input_is_refused(world: World) -> None:
    size, group, device = world.size, world.group, world.device
    x, full = torch.ones(ROWS, 4, device=device), torch.ones(ROWS * size, 4, device=device)
    weight = torch.ones(3, 4, device=device)

    def refused(call: Callable[[], object], message: str, error: type[Exception] = ValueError) -> None:
        with Calls() as calls, pytest.raises(error, match=message):
            call()
        assert calls.names == []

    def gather(x: Any, weights: Any = (weight,), **options: Any) -> Callable[[], object]:
        return lambda: all_gather_matmul(x, weights, group, **options)

    def scatter(x: Any, weight: Any = weight, **options: Any) -> Callable[[], object]:
        return lambda: matmul_reduce_scatter(x, weight, group, **options)

    operators: Sequence[tuple[str, Any, Tensor]] = (
        ("all_gather_matmul", gather, x),
        ("matmul_reduce_scatter", scatter, full),
    )
    for name, call, good in operators:
        refused(call(good.int()), rf"{name}: x must be fp32.*got int32 \[", TypeError)
        refused(call([1.0]), rf"{name}: x must be a tensor, got list", TypeError)
        refused(call(good[None]), rf"{name}: x must have 2 dimensions")
        refused(call(good.t()), rf"{name}: x must be contiguous.*call \.contiguous\(\)")
        refused(call(good, mode="fast"), rf"{name}: mode must be one of auto, .* got 'fast'")
        refused(call(good, num_chunks=0), rf"{name}: num_chunks must be at least 1, got 0")
        uneven = rf"{name}: num_chunks 3 does not divide the 8 rows of a rank .*the group has {size} ranks"
        refused(call(good, mode="chunked", num_chunks=3), uneven)
        if device == "cpu":
            refused(call(good, mode="fused"), rf'{name}: mode "fused" is impossible, there is no fused operator on cpu')
    refused(lambda: all_gather_matmul(x, [weight], None), "group must be a ProcessGroup", TypeError)  # type: ignore[arg-type]
    refused(lambda: reduce_from_group(x, "tp"), "group must be a ProcessGroup.*got 'tp'", TypeError)  # type: ignore[arg-type]
    refused(gather(x, []), "weights must hold at least one tensor")
    refused(gather(x, [weight, weight.int()]), r"weights\[1\] must be fp32", TypeError)
    refused(gather(x, [weight[:, :3]]), r"weights\[0\] must have shape \[3, 4\], got float32 \[3, 3\]")
    refused(gather(x, [weight.t().contiguous().t()]), r"the last dimension of weights\[0\] must be contiguous")
    refused(gather(x, [weight[0]]), r"weights\[0\] must have 2 dimensions")
    refused(scatter(full, weight.to("meta")), rf"weight must be on {full.device}, got float32 \[3, 4\] on meta")
    refused(scatter(full[1:]), rf"the {ROWS * size - 1} rows of x cannot be dealt over the {size} ranks")
    refused(lambda: reduce_scatter_rows(full[1:], group), "reduce_scatter_rows: the .* rows of x cannot be dealt")
    for function in (all_gather_rows, reduce_scatter_rows, copy_to_group, reduce_from_group):
        refused(lambda f=function: f(full.t(), group), rf"{function.__name__}: x must be contiguous")
        refused(lambda f=function: f(full.int(), group), rf"{function.__name__}: x must be fp32", TypeError)


def check_fp64(world: World) -> None:
    if world.device == "cpu":
        compare_all_gather_matmul(world, torch.float64, torch.float64, mode="chunked")
        compare_matmul_reduce_scatter(world, torch.float64, torch.float32, mode="chunked")


# ---- checks of MC2, on emulated NPUs

GATHER_MM, MM_SCATTER = "aclnnAllGatherMatmul", "aclnnMatmulReduceScatter"


def recorded(world: World, call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What `call` returns, and the matmuls and collectives that CANN was asked for."""
    with world.emulator.record() as calls:
        result = call()
    return result, [name for _, name in calls if name.startswith("Hccl") or name in (GATHER_MM, MM_SCATTER, "aclnnMm")]


def check_mc2_equals_one_device(world: World) -> None:
    for precision in ((BF16, FP32), (BF16, BF16), (FP16, FP32)):
        for keep_gathered in (False, True):
            compare_all_gather_matmul(world, *precision, mode="fused", keep_gathered=keep_gathered)
        compare_matmul_reduce_scatter(world, *precision, mode="fused")


def check_mc2_is_what_runs(world: World) -> None:
    for mode in ("fused", "auto"):
        x = world.random(0, ROWS, DEPTH, dtype=BF16).requires_grad_()
        full = world.random(1, ROWS * world.size, DEPTH, dtype=BF16).requires_grad_()
        weights = [world.random(n, n, DEPTH).requires_grad_() for n in WIDTHS]
        (y, other), names = recorded(world, lambda: all_gather_matmul(x, weights, world.group, mode=mode))  # noqa: B023
        assert names == [GATHER_MM, "aclnnMm"]
        backward = lambda: torch.autograd.backward((y, other), (y.detach(), other.detach()))  # noqa: B023, E731
        _, names = recorded(world, backward)
        assert sorted(names) == ["HcclAllGather", "HcclReduceScatter", "aclnnMm", "aclnnMm", "aclnnMm"]
        weights[0].grad = None  # else another matmul would add to it
        y, names = recorded(world, lambda: matmul_reduce_scatter(full, weights[0], world.group, mode=mode))  # noqa: B023
        assert names == [MM_SCATTER]
        _, names = recorded(world, lambda: y.backward(y.detach()))  # noqa: B023
        assert names == [GATHER_MM, "aclnnMm"]


def check_mc2_limits_are_ours_to_refuse(world: World) -> None:
    group = world.group
    x, full = world.random(0, ROWS, 256, dtype=BF16), world.random(1, ROWS * world.size, 256, dtype=BF16)
    shallow = world.random(2, 255, 256)
    impossible = 'mode "fused" is impossible, MC2'

    def refused(call: Callable[[], object], message: str) -> None:
        with world.emulator.record() as calls, pytest.raises(ValueError, match=message):
            call()
        assert calls == []

    x_fp32, x_shallow = x.float(), x[:, :255].contiguous()
    refused(lambda: all_gather_matmul(x_fp32, [shallow], group, mode="fused"), f"{impossible} .* x is torch.float32")
    depth = f"{impossible} contracts over 256 to 65534 elements, not 255"
    refused(lambda: all_gather_matmul(x_shallow, [shallow[:, :255]], group, mode="fused"), depth)
    refused(lambda: matmul_reduce_scatter(full, shallow, group, mode="fused"), depth)  # in backward
    deep = torch.zeros(1, 65535, dtype=BF16, device="npu")
    refused(lambda: all_gather_matmul(deep, [deep], group, mode="fused"), "not 65535")
    refused(lambda: all_gather_matmul(x[:0], [shallow], group, mode="fused"), "x is empty")
    with world.emulator.record() as calls:
        y = matmul_reduce_scatter(full, shallow, group)
    assert {name for _, name in calls}.isdisjoint((GATHER_MM, MM_SCATTER))
    torch.testing.assert_close(y, matmul_reduce_scatter(full, shallow, group, mode="reference"))
    if world.size == 4:
        three = dist.new_group([0, 1, 2])
        if world.rank < 3:
            ranks = f"{impossible} runs on 2, 4, 8 ranks, the group has 3"
            refused(lambda: all_gather_matmul(x, [shallow], three, mode="fused"), ranks)
            refused(lambda: matmul_reduce_scatter(full[:24], shallow, three, mode="fused"), ranks)
            compare_all_gather_matmul(World(three, "npu", world.emulator), BF16, FP32)


def check_mc2_takes_more_ranks_on_a3(world: World) -> None:
    class OfSixteen:
        def size(self) -> int:
            return 16

    limit = ascend.limit(world.random(0, ROWS, 256, dtype=BF16), [256], OfSixteen())  # type: ignore[arg-type]
    is_a3 = world.emulator.config.soc.startswith("Ascend910_93")
    assert (limit is None) == is_a3


ALL = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}
CHECKS = {name: check for name, check in ALL.items() if not name.startswith("mc2_")}
NPU_OPTIONS: dict[int, dict[str, Any]] = {2: {"asynchronous": True, "soc": "Ascend910_9392"}, 4: {}}


# ---- running them


def run_checks(world: World, checks: dict[str, Callable[[World], None]]) -> dict[str, str]:
    """What failed on this rank, by the name of the check. Then ranks may be out of step: what follows is not run."""
    failures: dict[str, str] = {}
    for name, check in checks.items():
        if failures:
            failures[name] = f"not run on rank {world.rank} after the failure of {next(iter(failures))}"
            continue
        try:
            check(world)
        except BaseException:
            failures[name] = f"rank {world.rank}:\n{traceback.format_exc()}"
    return failures


def run_gloo(rank: int, size: int, store: str) -> dict[str, str]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    failures = run_checks(World(group, "cpu"), CHECKS)
    dist.destroy_process_group()
    return failures


def run_npu(rank: int, size: int, store: str) -> dict[str, str]:
    with emulated_npu(**NPU_OPTIONS[size]) as emulator:
        torch.get_device_module("npu").set_device(rank)
        dist.init_process_group("hccl", store=dist.FileStore(store, size), rank=rank, world_size=size)
        group = dist.group.WORLD
        assert group is not None
        failures = run_checks(World(group, "npu", emulator), ALL)
        dist.destroy_process_group()
    return failures


Failures = Callable[[int], dict[str, str]]


def run_once(folder: Path, run: Callable[[int, int, str], dict[str, str]]) -> Failures:
    results: dict[int, dict[str, str]] = {}
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch._subclasses.fake_tensor", "pangu_kernels.overlap"])  # once, not per rank

    def failures(size: int) -> dict[str, str]:
        if size not in results:
            with ProcessPoolExecutor(size, mp_context=context) as pool:
                ranks = [pool.submit(run, rank, size, str(folder / f"store{size}")) for rank in range(size)]
                results[size] = {name: text for rank in ranks for name, text in rank.result().items()}
        return results[size]

    return failures


@pytest.fixture(scope="module")
def gloo_failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    return run_once(tmp_path_factory.mktemp("gloo"), run_gloo)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_on_gloo(size: int, check: str, gloo_failures: Failures) -> None:
    assert gloo_failures(size).get(check) is None, gloo_failures(size)[check]


@pytest.fixture(scope="module")
def npu_failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    if find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed")
    return run_once(tmp_path_factory.mktemp("npu"), run_npu)


@pytest.mark.ascend
@pytest.mark.parametrize("check", ALL)
@pytest.mark.parametrize("size", NPU_OPTIONS)
def test_on_emulated_npus(size: int, check: str, npu_failures: Failures) -> None:
    assert npu_failures(size).get(check) is None, npu_failures(size)[check]


# ---- without other ranks


@pytest.fixture
def fake_group() -> Iterator[dist.ProcessGroup]:
    """Of 8 ranks of which only this one exists: its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("mode", ["reference", "chunked", "auto"])
def test_a_dry_run_executes_it(mode: str, dtype: torch.dtype, fake_group: dist.ProcessGroup) -> None:
    """On fake tensors, of the Pangu Ultra 135B's size."""
    with FakeTensorMode():
        x = torch.empty(1024, 12288, dtype=dtype, requires_grad=True)
        weights = [torch.empty(n, 12288, requires_grad=True) for n in (1536, 512)]
        ys = all_gather_matmul(x, weights, fake_group, mode=mode)
        assert [(y.shape, y.dtype) for y in ys] == [((8192, 1536), dtype), ((8192, 512), dtype)]
        weight = torch.empty(12288, 1536, requires_grad=True)
        y = matmul_reduce_scatter(ys[0] + ys[1].sum(), weight, fake_group, mode=mode)
        assert (y.shape, y.dtype) == ((1024, 12288), dtype)
        total = reduce_scatter_rows(copy_to_group(all_gather_rows(y, fake_group), fake_group), fake_group)
        reduce_from_group(total, fake_group).sum().backward()
    for leaf in (x, *weights, weight):
        assert leaf.grad is not None
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


def test_auto_says_once_why_it_does_not_overlap(
    fake_group: dist.ProcessGroup, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes._log_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with FakeTensorMode(), torch.no_grad():
        for rows, device in ((8190, "cpu"), (8190, "cpu"), (8189, "cpu"), (4, "cuda"), (8, "cuda")):
            weight = torch.empty(1, 4096, device=device)
            all_gather_matmul(torch.empty(rows, 4096, device=device), [weight], fake_group)
    assert [record.message for record in caplog.records] == [
        "all_gather_matmul: not overlapped, num_chunks 4 does not divide the 8190 rows of a rank",
        "all_gather_matmul: not overlapped, num_chunks 4 does not divide the 8189 rows of a rank",
        "all_gather_matmul: not fused, symmetric memory is of one node, which has 0 devices, the group has 8 ranks",
    ]


def test_calls_of_cuda_fit_the_operators(fake_group: dist.ProcessGroup) -> None:
    """All that a machine without a GPU can show: arguments and shapes."""
    x, full = torch.empty(4, 6, device="meta"), torch.empty(32, 6, device="meta")
    matrices = [torch.empty(n, 6, device="meta").t() for n in (2, 3)]
    for keep_gathered in (False, True):
        products, gathered = cuda.all_gather_matmul(x, matrices, fake_group, keep_gathered)
        assert [y.shape for y in products] == [(32, 2), (32, 3)]
        assert gathered.shape == (32, 6) if keep_gathered else gathered is None
    assert cuda.matmul_reduce_scatter(full, matrices[1], fake_group).shape == (4, 3)


def test_symmetric_memory_is_of_one_node(fake_group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert cuda.limit(torch.ones(2, 4), [4], fake_group) is None
    assert cuda.limit(torch.ones(0, 4), [4], fake_group) == "x is empty"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    message = cuda.limit(torch.ones(2, 4), [4], fake_group)
    assert message == "symmetric memory is of one node, which has 4 devices, the group has 8 ranks"
