"""Triton's kernels compile for Ascend as far as that goes without CANN: lowered by triton-ascend, compiled by
bishengir-compile, which stops where it would call `hivmc`. Errors in the code and tiles too large for the unified
buffer are found before. Run by `launch/triton_ascend.sh`, in an environment of its own: triton-ascend is a `triton`.
"""

import importlib
import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.backends.ascend") is None:
    pytest.skip("triton-ascend is not installed; launch/triton_ascend.sh installs it", allow_module_level=True)

from pangu_kernels.rms_norm.triton_kernel import BACKWARD_ROWS
from pangu_kernels.triton_tiles import tile_shape
from test_triton_compile import KERNELS, signature

TARGETS = ("Ascend910B2", "Ascend910_9392")  # Atlas A2, A3
SIZES = (1, 64, 128, 1408, 12288)  # of a row, or of half a head; 12,288 is the hidden size of the 135B
# What triton-ascend's own options come to on these targets; more buffers than one overlap loads with computing.
OPTIONS = (
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
    "--enable-auto-multi-buffer=True",
    "--enable-auto-bind-sub-block=True",
)


def lower(kernel: Any, constants: dict[str, Any], dtype: str, target: str) -> str:
    """The kernel in MLIR's linalg, as triton-ascend hands it to the compiler."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    gpu_target = GPUTarget("npu", target, 0)
    backend = make_backend(gpu_target)
    options, context, stages = backend.parse_options({}), ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options)
    source = ASTSource(kernel, signature(kernel, constants, dtype), constants)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {"hash": "", "target": gpu_target, **options.__dict__}
    for stage in ("ttir", "ttadapter"):
        module = stages[stage](module, metadata)
    return str(module)


def compile_for(target: str, source: str, folder: Path) -> list[str]:
    """What bishengir-compile has to say, less what follows from the missing `hivmc`."""
    import ascendnpuir

    compiler = Path(ascendnpuir.__file__).parent / "bin" / "bishengir-compile"
    (folder / "kernel.mlir").write_text(source)
    command = [compiler, folder / "kernel.mlir", f"--target={target}", *OPTIONS, "-o", folder / "kernel.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    if done.returncode and not any("External hivmc run fails" in line for line in lines):
        return lines
    return [line for line in lines if "hivmc" not in line and line != "[ERROR] Failed to run BiShengIR pipeline"]


def tiles(constants: dict[str, Any]) -> list[dict[str, Any]]:
    """The constants at all sizes, each shape of a tile once; as they are for a kernel without rows."""
    if "ROWS" not in constants:
        return [constants]
    rows = BACKWARD_ROWS if constants["ROWS"] == BACKWARD_ROWS else 1
    shapes = {tuple(tile_shape(size, rows).items()) for size in SIZES}
    return [constants | dict(shape) for shape in sorted(shapes)]


def kernel_of(operator: str, name: str) -> Any:
    return getattr(importlib.import_module(f"pangu_kernels.{operator}.triton_kernel"), name)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("operator", "name", "constants"), KERNELS)
def test_compiles_and_fits(
    operator: str, name: str, constants: dict[str, Any], target: str, dtype: str, tmp_path: Path
) -> None:
    for shape in tiles(constants):
        source = lower(kernel_of(operator, name), shape, dtype, target)
        assert compile_for(target, source, tmp_path) == [], shape


def test_a_tile_that_does_not_fit_is_found(tmp_path: Path) -> None:
    source = lower(kernel_of("adamw", "step_kernel"), {"COLUMNS": 2**14}, "fp32", TARGETS[0])
    assert any("ub overflow" in line for line in compile_for(TARGETS[0], source, tmp_path))


def test_code_that_does_not_compile_is_found(tmp_path: Path) -> None:
    source = lower(kernel_of("adamw", "step_kernel"), {"COLUMNS": 2048}, "fp32", TARGETS[0])
    assert compile_for(TARGETS[0], source.replace("arith.mulf", "arith.nothing", 1), tmp_path)
