"""Which CANN libraries and functions an installed torch_npu needs, read from its binaries."""

import ctypes
import re
import subprocess
from pathlib import Path

_ACLNN_NAME = re.compile(rb"aclnn[A-Z][A-Za-z0-9_]*(?=\0)")


def binaries(torch_npu: Path) -> list[Path]:
    """The shared objects that `import torch_npu` loads, given the package's folder."""
    # Optional ones (such as ATB's) are loaded only by their own users, and need libraries of their own.
    optional = {"libop_plugin_atb.so"}
    return [*torch_npu.glob("_C*.so"), *(path for path in torch_npu.glob("lib/*.so") if path.name not in optional)]


def needed_libraries(torch_npu: Path, torch: Path) -> set[str]:
    """Names of the libraries that torch_npu links against and that are neither torch's nor the system's."""
    present = {path.name for folder in (torch_npu, torch) for path in folder.glob("lib/*.so*")}
    needed: set[str] = set()
    for binary in binaries(torch_npu):
        needed.update(re.findall(r"\(NEEDED\).*\[(.+)\]", _run("readelf", "-d", binary)))
    # Libraries of the system carry a version in their name, as in libc.so.6.
    return {name for name in needed - present if name.endswith(".so")}


def needed_functions(torch_npu: Path, torch: Path) -> set[str]:
    """Functions that have to exist for torch_npu to be loaded, and that only CANN defines."""
    needed: set[str] = set()
    for binary in binaries(torch_npu):
        needed.update(_symbols(binary, "--undefined-only", kinds="U"))
    # glibc's are versioned (as in dlopen@GLIBC_2.34) or in this process, C++ ones mangled: CANN's are plain C.
    process = ctypes.CDLL(None)
    needed = {name for name in needed if "@" not in name and not name.startswith("_Z") and not hasattr(process, name)}
    for library in [*binaries(torch_npu), *torch.glob("lib/*.so")]:
        needed -= _symbols(library, "--defined-only", kinds="TWBDVi")
    return needed


def operator_functions(torch_npu: Path) -> set[str]:
    """Names of the aclnn operators that op-plugin may look up when it first calls them."""
    names: set[str] = set()
    for binary in binaries(torch_npu):
        names.update(match.decode() for match in _ACLNN_NAME.findall(binary.read_bytes()))
    return {name.removesuffix("GetWorkspaceSize") for name in names}


def _symbols(binary: Path, which: str, kinds: str) -> set[str]:
    lines = (line.split() for line in _run("nm", "-D", which, binary).splitlines())
    return {fields[-1] for fields in lines if fields[-2] in kinds}


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
