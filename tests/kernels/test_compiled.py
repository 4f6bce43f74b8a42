"""The C++ kernels of the CPU: built once, and never missed where they cannot be."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pangu_kernels import attention, compiled, rms_norm, sandwich_norm

PROGRAM = """
import logging, torch, pangu_kernels
logging.basicConfig(format="LOGGED %(name)s %(message)s")
print("imported")
x = torch.randn(4, 6, requires_grad=True)
for _ in range(2):
    pangu_kernels.rms_norm(pangu_kernels.swiglu(x), torch.ones(3), 1e-5).sum().backward()
print("gradient", x.grad.isfinite().all().item())
"""


def run(cache: Path, compiler: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "CXX": compiler}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)


def test_without_a_compiler_references_run_and_one_line_says_so(tmp_path: Path) -> None:
    result = run(tmp_path, "no-such-compiler")
    assert result.stdout == "imported\ngradient True\n"
    assert result.stderr.count("LOGGED") == 1
    assert "LOGGED pangu_kernels.compiled CPU kernels were not compiled" in result.stderr
    assert "no-such-compiler" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_built_once_into_the_users_cache(tmp_path: Path) -> None:
    assert run(tmp_path, "g++").stderr == ""
    (library,) = (tmp_path / "pangu_kernels").iterdir()
    built = library.stat().st_mtime_ns
    assert run(tmp_path, "g++").stderr == ""
    assert [path.stat().st_mtime_ns for path in (tmp_path / "pangu_kernels").iterdir()] == [built]


def test_the_cpu_computes_fp32_with_them() -> None:
    if compiled.kernel("swiglu", "ppiii") is None:
        pytest.skip("no compiler")
    x = torch.randn(3, 4)
    assert compiled.kernel("swiglu", "ppiii", x) is not None
    for other in (x.bfloat16(), x.double(), x.T, x[:0]):
        assert compiled.kernel("swiglu", "ppiii", other) is None


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(300, 129, requires_grad=True) for _ in range(2))
    gain, other_gain = (torch.randn(129, requires_grad=True) for _ in range(2))
    heads = torch.randn(300, 4, 32, requires_grad=True)
    documents = torch.tensor([0, 70, 300], dtype=torch.int32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        new_residual, normed = sandwich_norm(x, y, gain, other_gain, 1e-5)
        assert normed is not None
        loss = (new_residual * normed * rms_norm(x, gain, 1e-5)).sum()
        out, _ = attention(heads, heads[:, :2], heads[:, 2:], documents, documents, 0.25)
        loss = loss + out.square().sum()
        results.append([normed, out, *torch.autograd.grad(loss, (x, y, gain, other_gain, heads))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
