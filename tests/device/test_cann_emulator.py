"""The emulator in one process: what it refuses, and the genuine torch_npu working on it."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pangu.device.cann_emulator import Emulator, emulated_npu, install, libraries
from pangu.errors import DeviceError

needs_torch_npu = pytest.mark.skipif(find_spec("torch_npu") is None, reason="torch_npu is not installed")


def test_without_torch_npu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install torch-npu==2\.13\."):
        libraries.build_libraries()


def package_spec() -> ModuleSpec:
    spec = ModuleSpec("package", None, is_package=True)
    spec.submodule_search_locations = ["/nowhere"]
    return spec


def test_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda name: package_spec())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DeviceError, match=r"no-such-compiler is not on PATH.*apt-get install g\+\+"):
        libraries.build_libraries()


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(libraries, "_key", lambda compiler: "key")
    monkeypatch.setattr(libraries, "find_spec", lambda name: package_spec())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DeviceError, match="set XDG_CACHE_HOME to a folder that can be written"):
        libraries.build_libraries()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soc": "Ascend310"}, "soc: 'Ascend310' is not emulated; choose one of Ascend910B2"),
        ({"num_devices": 0}, "num_devices: 0 must be at least 1"),
        ({"memory_bytes": 10}, "memory_bytes: 10 must be at least"),
    ],
)
def test_impossible_machines_are_refused(options: dict, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        install(**options)


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    if find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed")
    with emulated_npu() as installed:
        yield installed


@pytest.mark.ascend
def test_a_second_install_with_other_parameters_is_refused(emulator: Emulator) -> None:
    assert install() is emulator
    with pytest.raises(DeviceError, match="torch_npu can be loaded only once per process"):
        install(num_devices=4)


@pytest.mark.ascend
def test_the_device_is_what_was_asked_for(emulator: Emulator) -> None:
    assert torch.accelerator.current_accelerator() == torch.device("npu")
    assert torch.npu.device_count() == torch.accelerator.device_count() == 8
    assert torch.npu.get_device_name() == "Ascend910B2"
    assert torch.npu.mem_get_info()[1] == 64 << 30


@pytest.mark.ascend
def test_tensors_move_compute_and_come_back(emulator: Emulator) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    y = x.npu()
    assert y.device == torch.device("npu:0")
    assert torch.equal((y @ y.t() + 1).cpu(), x @ x.t() + 1)
    assert torch.equal(y.t().contiguous().to(torch.bfloat16).cpu(), x.t().to(torch.bfloat16))
    assert torch.equal(x.pin_memory().to("npu", non_blocking=True).cpu(), x)
    assert y[1, 2].item() == 5
    y[:, 1].zero_()
    assert y.sum().item() == 10
    out = torch.empty(0, device="npu")
    torch.add(y, 1, out=out)
    assert out.shape == (2, 3)
    assert torch.equal(y.nonzero().cpu(), y.cpu().nonzero())
    assert (y.to("npu:3") + 1).device == torch.device("npu:3")


@pytest.mark.ascend
def test_random_numbers_follow_the_seed_and_the_saved_state(emulator: Emulator) -> None:
    torch.npu.manual_seed(1)
    first = torch.randn(4, device="npu").cpu()
    state = torch.npu.get_rng_state()
    second = torch.randn(4, device="npu").cpu()
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.randn(4, device="npu").cpu(), second)
    torch.npu.manual_seed(1)
    assert torch.equal(torch.randn(4, device="npu").cpu(), first)
    assert not torch.equal(first, second)
    kept = F.dropout(torch.ones(1000, device="npu"), 0.25).count_nonzero().item()
    assert 700 < kept < 800
    cpu_state = torch.get_rng_state()
    F.dropout(torch.ones(10, device="npu"), 0.5)
    assert torch.equal(torch.get_rng_state(), cpu_state)


@pytest.mark.ascend
def test_memory_is_counted(emulator: Emulator) -> None:
    torch.npu.empty_cache()
    before = torch.npu.memory_allocated()
    free = torch.npu.mem_get_info()[0]
    block = torch.empty(64 << 20, dtype=torch.uint8, device="npu")
    assert 0 <= torch.npu.memory_allocated() - before - (64 << 20) <= 512  # torch_npu pads
    assert free - torch.npu.mem_get_info()[0] >= 64 << 20
    del block
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] == free
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(65 << 30, dtype=torch.uint8, device="npu")


@pytest.mark.ascend
def test_an_operator_without_values_is_an_error_that_names_it(emulator: Emulator) -> None:
    import torch_npu

    with pytest.raises(RuntimeError, match=r"aclnnGeGluV3 has no numerics \(strict mode\)"):
        torch_npu.npu_geglu(torch.ones(2, 8, device="npu"))


@pytest.mark.ascend
def test_recorded_calls_are_those_of_torch_npu(emulator: Emulator) -> None:
    x, weight = torch.ones(2, 4, device="npu", requires_grad=True), torch.ones(3, 4, device="npu")
    with emulator.record() as calls:
        F.gelu(F.linear(x, weight)).sum().backward()
    names = [call.name for call in calls if call.kind == "aclnn"]
    assert names[:3] == ["aclnnMm", "aclnnGelu", "aclnnReduceSum"]
    assert "aclnnGeluBackward" in names
    with emulator.record() as calls:
        x.detach().view(4, 2)
    assert calls == []


class Block(nn.Module):
    """A small pre-norm transformer block and what is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.norm = nn.RMSNorm(16)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.output = nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)  # [batch, sequence, hidden]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)  # [batch, heads, sequence, 8]
        scores = (q @ k.transpose(-1, -2)).masked_fill(torch.ones(6, 6, device=x.device).triu(1).bool(), -torch.inf)
        x = x + self.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.silu(self.up(x))))


def train(device: str, steps: int = 3) -> list[float]:
    """The losses and, last, the gradient norm of a small training run."""
    torch.manual_seed(0)
    model = Block()
    batches = [torch.randint(0, 11, (4, 7)) for _ in range(steps)]
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    record = []
    for batch in batches:
        tokens, labels = batch[:, :-1].to(device), batch[:, 1:].to(device)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        record.append(loss.item())
    return [*record, norm.item()]


def check_streams_and_events() -> None:
    side, start, end = torch.npu.Stream(), torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    source, target = torch.ones(1 << 23).pin_memory(), torch.empty(1 << 23).pin_memory()
    start.record()
    with torch.npu.stream(side):  # copies that are long enough to be under way when the next lines run
        x = source.to("npu", non_blocking=True)
    torch.npu.current_stream().wait_stream(side)
    y = x * 3
    target.copy_(y, non_blocking=True)
    end.record()
    end.synchronize()
    assert y.eq(3).all().item()
    assert target.eq(3).all()
    assert end.query()
    assert start.elapsed_time(end) > 0


def in_another_process(asynchronous: bool, soc: str) -> tuple[list[float], str]:
    with emulated_npu(soc=soc, asynchronous=asynchronous):
        check_streams_and_events()
        return train("npu"), torch.npu.get_device_name()


def only_shapes() -> tuple[list[int], list[str]]:
    with emulated_npu(strict=False) as emulator:
        import torch_npu

        x = torch.ones(2, 8, device="npu")
        with emulator.record() as calls:
            output = torch_npu.npu_geglu(x)[0]
        return list(output.shape), [call.name for call in calls]


@pytest.mark.ascend
def test_training_equals_the_cpu(emulator: Emulator) -> None:
    expected = train("cpu")
    assert train("npu") == expected
    with emulator.record() as calls:
        assert train("npu") == expected
    assert {"aclnnEmbedding", "aclnnSoftmax", "aclnnAddmm", "aclnnSilu"} <= {call.name for call in calls}
    check_streams_and_events()


@pytest.mark.ascend
@pytest.mark.parametrize(
    ("asynchronous", "task_queue", "soc"),
    [(True, "1", "Ascend910B3"), (True, "0", "Ascend910B2"), (False, "2", "Ascend910_9392")],
)
@needs_torch_npu
def test_streams_and_task_queues(
    asynchronous: bool, task_queue: str, soc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASK_QUEUE_ENABLE", task_queue)
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True" if asynchronous else "")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        losses, name = pool.submit(in_another_process, asynchronous, soc).result()
    assert losses == train("cpu")
    assert name == soc


@pytest.mark.ascend
@needs_torch_npu
def test_without_strictness_an_operator_without_values_has_its_shapes() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(only_shapes).result() == ([2, 4], ["aclnnGeGluV3"])


def compile_with(compiler: str) -> list[str]:
    os.environ["CXX"] = compiler
    built = libraries.build_libraries()
    return [path.name for path in [*built.cann, built.cpu_fallback] if path.exists()]


@pytest.mark.ascend
@needs_torch_npu
def test_processes_that_start_together_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && echo 1 && exit
while [ "$1" != -o ]; do shift; done
echo "$2" >> {log}
touch "$2"
"""
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        built = list(pool.map(compile_with, [str(compiler)] * 2))
    assert built[0] == built[1]
    assert built[0][0] == "libascendcl.so"
    assert {"libhccl.so", "libopapi.so", "cpu_fallback.so"} <= set(built[0])
    assert len(log.read_text().splitlines()) == len(built[0])
