"""Triton's kernels compile for CUDA: no GPU is needed for that, only to run them."""

import importlib
import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

ROWS = {"ROWS": 8, "COLUMNS": 256}
ROW = {"ROWS": 1, "COLUMNS": 2048}
WITHOUT_PRE = {"d_normed": None, "new_residual": None, "pre_weight": None}
FP32 = {"rstd", "post_rstd", "pre_rstd", "d_weights", "d_post_weights", "d_pre_weights", "cos", "sin", "grad_scale"}
FP32 |= {"logits", "token_weights", "losses", "weight", "post_weight", "pre_weight"}
INTEGERS = {"num_rows", "size", "heads", "head_dim", "token_stride", "head_stride"}
NUMBERS = {"eps", "decay", "step_size", "root", "new_share", "new_square_share"}
KERNELS: list[tuple[str, str, dict[str, Any]]] = [
    ("adamw", "step_kernel", {"COLUMNS": 2048}),
    ("adamw", "step_kernel", {"COLUMNS": 2048, "grad_scale": None}),
    ("linear_cross_entropy", "softmax_kernel", {"NEEDS_GRAD": True, "COLUMNS": 2048}),
    ("linear_cross_entropy", "softmax_kernel", {"NEEDS_GRAD": False, "COLUMNS": 2048}),
    ("local_filter", "pair_kernel", ROW | {"OFFSET": -1}),
    ("local_filter", "pair_kernel", ROW | {"OFFSET": 1}),
    ("rms_norm", "forward_kernel", ROW),
    ("rms_norm", "backward_kernel", ROWS),
    ("rope", "rotate_kernel", {"TRANSPOSED": False, "ROWS": 32, "COLUMNS": 64}),
    ("rope", "rotate_kernel", {"TRANSPOSED": True, "ROWS": 32, "COLUMNS": 64}),
    ("sandwich_norm", "forward_kernel", ROW),
    ("sandwich_norm", "forward_kernel", ROW | {"post_weight": None}),
    ("sandwich_norm", "forward_kernel", ROW | {"pre_weight": None}),
    ("sandwich_norm", "backward_kernel", ROWS),
    ("sandwich_norm", "backward_kernel", ROWS | {"d_new_residual": None}),
    ("sandwich_norm", "backward_kernel", ROWS | {"y": None, "post_weight": None}),
    ("sandwich_norm", "backward_kernel", ROWS | WITHOUT_PRE),
    ("swiglu", "forward_kernel", ROW),
    ("swiglu", "backward_kernel", ROW),
]


def signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """Triton's name of every argument's type, with tensors of activations in `dtype`."""
    types = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(NUMBERS, "fp32") | dict.fromkeys(FP32, "*fp32")
    types |= {"labels": "*i64", "continues": "*i32"}
    return {a: "constexpr" if a in constants else types.get(a, f"*{dtype}") for a in kernel.arg_names}


def compile_all(dtype: str) -> None:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for operator, name, constants in KERNELS:
        kernel = getattr(importlib.import_module(f"pangu_kernels.{operator}.triton_kernel"), name)
        source = ASTSource(kernel, signature(kernel, constants, dtype), constants)
        compiled = compile(source, target=GPUTarget("cuda", 80, 32))
        assert ".target sm_80" in compiled.asm["ptx"]
        assert compiled.metadata.shared < 48 * 1024, "more than any GPU gives without being asked"
        print(operator, name)


@pytest.mark.parametrize("dtype", ["bf16", *(pytest.param(t, marks=pytest.mark.slow) for t in ("fp16", "fp32"))])
def test_compiles_for_an_a100(dtype: str, tmp_path: Any) -> None:
    """In a process of its own: Triton either interprets or compiles, and `test_triton.py` has it interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, __file__, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(KERNELS)


if __name__ == "__main__":
    compile_all(sys.argv[1])
