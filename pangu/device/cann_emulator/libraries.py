"""Builds the emulated CANN libraries with the host's C++ compiler, once per set of versions, into a cache folder."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from pangu.device.cann_emulator import symbols
from pangu.errors import DeviceError

_SOURCES = Path(__file__).parent / "src"
_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-D_GLIBCXX_USE_CXX11_ABI=1"]
_RUNTIME = "libascendcl.so"
_OPERATORS = "libopapi.so"
_HCCL = "libhccl.so"
_FALLBACK = "cpu_fallback.so"


@dataclass(frozen=True)
class Libraries:
    """The built libraries. `cann` is in the order of loading: the runtime first, which the others use."""

    cann: list[Path]
    cpu_fallback: Path


def build_libraries() -> Libraries:
    """The libraries for the installed torch and torch_npu, built first if need be (half a minute).

    Processes that start together build once: the others wait. Raises DeviceError, naming what to install, where
    torch_npu or a C++ compiler is missing or the compiler fails.
    """
    torch_npu, torch = _package_folder("torch_npu"), _package_folder("torch")
    compiler = _compiler()
    folder = _cache_folder() / _key(compiler)
    if not folder.exists():
        with _lock(folder.with_suffix(".lock")):
            if not folder.exists():
                _build_into(folder, compiler, torch_npu, torch)
    others = sorted(path for path in folder.glob("lib*.so") if path.name != _RUNTIME)
    return Libraries([folder / _RUNTIME, *others], folder / _FALLBACK)


def _package_folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        torch_version = version("torch").split("+")[0]
        raise DeviceError(
            f"{name} is not installed; the emulator runs the genuine torch_npu: pip install torch-npu=={torch_version}"
        )
    return Path(spec.submodule_search_locations[0])


def _compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    for tool in (compiler, "nm", "readelf"):
        if shutil.which(tool) is None:
            raise DeviceError(
                f"{tool} is not on PATH; the CANN emulator is built with it on first use: install g++ and binutils "
                "(Debian and Ubuntu: apt-get install g++, Fedora and openEuler: dnf install gcc-c++)"
            )
    return compiler


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pangu" / "cann_emulator"


def _key(compiler: str) -> str:
    """Of everything that the result depends on."""
    digest = hashlib.sha256()
    for source in sorted([*_SOURCES.iterdir(), Path(__file__), Path(symbols.__file__)]):
        digest.update(source.read_bytes())
    compiler_version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    digest.update(compiler_version + " ".join(_FLAGS).encode())
    digest.update(f"{version('torch')} {version('torch-npu')}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DeviceError(
            f"the CANN emulator cannot be built into {path.parent} ({error.strerror}); set XDG_CACHE_HOME to a folder "
            "that can be written"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield


def _build_into(folder: Path, compiler: str, torch_npu: Path, torch: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        built = Path(temporary) / "built"
        built.mkdir()
        _write_list(built / "operators.inc", "OPERATOR", symbols.operator_functions(torch_npu))
        _write_list(built / "functions.inc", "FUNCTION", symbols.needed_functions(torch_npu, torch))
        include = [f"-I{torch / 'include'}"]
        runtime = ["runtime.cpp", "stream.cpp", "memory.cpp", "legacy_ops.cpp", "generated.cpp"]
        torch_libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        libraries = {
            _FALLBACK: ["cpu_fallback.cpp", *include, *torch_libraries],
            _OPERATORS: ["opapi.cpp", "generated.cpp", *include, _list_definition(built / "operators.inc")],
            _RUNTIME: [*runtime, _list_definition(built / "functions.inc")],
            _HCCL: ["hccl.cpp", "communicator.cpp", "reduction.cpp", *include],
        }
        # The remaining names hold nothing themselves: what is looked up in them is found in the runtime.
        others = symbols.needed_libraries(torch_npu, torch) - libraries.keys()
        empty = {name: ["-Wl,--no-as-needed", str(built / _RUNTIME)] for name in others}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for group in (libraries, empty):
                list(pool.map(lambda item: _compile(compiler, built / item[0], item[1]), group.items()))
        built.rename(folder)


def _write_list(path: Path, macro: str, names: set[str]) -> None:
    path.write_text("".join(f"{macro}({name})\n" for name in sorted(names)))


def _list_definition(path: Path) -> str:
    return f'-DGENERATED_LIST="{path}"'


def _compile(compiler: str, library: Path, arguments: list[str]) -> None:
    command = [compiler, *_FLAGS, f"-Wl,-soname,{library.name}", "-o", str(library), *arguments]
    finished = subprocess.run(command, cwd=_SOURCES, capture_output=True, text=True)
    if finished.returncode != 0:
        raise DeviceError(f"the CANN emulator could not be built:\n{' '.join(command)}\n{finished.stderr}")
