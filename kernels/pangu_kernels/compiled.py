"""The CPU kernels in C++ (`*/cpu.cpp`): built by the machine's compiler on first use, into the user's cache.

A fused kernel saves the passes over memory that separate operations make, and most of their microseconds on small
tensors; without a compiler the references compute the same. Plain C functions called through ctypes need neither
PyTorch's headers (the build takes two seconds, not half a minute) nor a rebuild for another version of it. Against
PyTorch's own compiler, sandwich_norm forward and backward on one core, fp32 `[T, 512]`, in milliseconds:

    T       eager     torch.compile    this
    512      2.97     0.74             0.74
    2048    15.3      4.0              2.8

where torch.compile takes 10 s to 60 s before the first call, and as long again when the sizes become dynamic.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
# The last two are what vectorization needs of -ffast-math, which would flush denormal numbers in PyTorch's threads too.
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}
BLOCKS = 32
"""Parts in which gradients of gains are summed: a fixed number, so that results do not depend on that of threads."""
_SERIAL_ELEMENTS = 32_768


def kernel(name: str, signature: str, *tensors: Tensor | None) -> Callable[..., None] | None:
    """The C function `name` if it can compute on `tensors`, all contiguous fp32 with something in them; else None.

    `signature` has a letter per argument: p for an address, i for an integer, f for a float, d for a double.
    """
    for tensor in tensors:
        if tensor is not None and not (tensor.dtype is torch.float32 and tensor.is_contiguous() and tensor.numel()):
            return None
    return function(name, signature)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def threads(x: Tensor) -> int:
    """As many as PyTorch's, but one where there is too little work to share."""
    return 1 if x.numel() < _SERIAL_ELEMENTS else torch.get_num_threads()


@functools.cache
def function(name: str, signature: str, source: Path | None = None) -> Callable[..., Any] | None:
    """The C function `name` of `source`, else of the kernels; None where they cannot be compiled, which is logged once.

    `signature` as that of `kernel`; a letter after a colon is what the function returns.
    """
    library = _library(source)
    if library is None:
        return None
    arguments, _, result = signature.partition(":")
    found = getattr(library, name)
    found.argtypes = [_TYPES[letter] for letter in arguments]
    found.restype = _TYPES.get(result)
    return cast(Callable[..., Any], found)


@functools.cache
def _library(source: Path | None) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_build([source] if source else sorted(_FOLDER.glob("*/cpu.cpp")))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        detail = str(getattr(error, "stderr", None) or error).strip()[-500:]
        what = f"The functions of {source.name}" if source else "CPU kernels"
        logging.getLogger(__name__).warning("%s were not compiled, slower references run instead: %s", what, detail)
        return None


def _build(sources: Sequence[Path]) -> Path:
    """Path of the library, compiled unless the cache has one of these sources for this compiler and processor."""
    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    contents = [path.read_text(encoding="utf-8") for path in (_FOLDER / "rows.h", *sources)]
    key = hashlib.sha256("\0".join([version, _processor(), *_FLAGS, *contents]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pangu_kernels"
    library = folder / f"{sources[0].stem}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # several processes may build at once
            built = Path(temporary) / library.name
            command = [compiler, *_FLAGS, f"-I{_FOLDER}", *map(str, sources), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            built.replace(library)
    return library


def _processor() -> str:
    """What -march=native depends on: home directories are shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.machine() + platform.processor() + flags
