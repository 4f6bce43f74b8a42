"""What can be seen without computing anything: software, driver, devices, links, memory."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from pangu.config import Config
from pangu.doctor import npu_smi, variables
from pangu.doctor.findings import Finding

_TORCH = "2.13"
_OLDEST_DRIVER = (23, 0, 0)
"""Expandable memory segments need it (torch_npu's reference of PYTORCH_NPU_ALLOC_CONF)."""
_DEVICE_NODES = ("dev/davinci_manager", "dev/devmm_svm", "dev/hisi_hdc")
_DRIVER_DOCS = "install the driver and firmware of the device, then check with `npu-smi info`"


@dataclass(frozen=True)
class Machine:
    """Where the doctor looks. Tests give another root and environment."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def npu_nodes(self) -> list[Path]:
        """A device file per NPU, in the order of their numbers."""
        nodes = [path for path in (self.root / "dev").glob("davinci*") if path.name[7:].isdigit()]
        return sorted(nodes, key=lambda path: int(path.name[7:]))

    @property
    def has_npu(self) -> bool:
        return bool(self.npu_nodes)


def examine(config: Config, machine: Machine | None = None) -> list[Finding]:
    """All there is to see for a run of `config`. Imports neither torch nor torch_npu in this process."""
    machine = machine or Machine()
    findings = [*_software(machine), *_cann(machine), *_driver(machine), *_memory(machine)]
    return findings + variables.examine(
        config, machine.environ, uses_npu=machine.has_npu or config.train.device == "npu"
    )


# ---- software


def _software(machine: Machine) -> Iterator[Finding]:
    section = "software"
    python = platform.python_version()
    good = sys.version_info >= (3, 10)
    yield Finding(section, "python", "pass" if good else "fail", python, "" if good else "install Python 3.10 or newer")
    yield _torch(section)
    yield from _torch_npu(section, machine)
    compiler = machine.environ.get("CXX", "g++")
    version = _output(compiler, "--version").partition("\n")[0]
    fix = f"install {compiler}: without it the CPU's kernels run several times slower, and nothing can be emulated"
    yield Finding(
        section, "C++ compiler", "pass" if version else "warn", version or "not there", "" if version else fix
    )


def _torch(section: str) -> Finding:
    version = _version("torch")
    if version is None:
        return Finding(section, "torch", "fail", "not installed", f"pip install 'torch=={_TORCH}.*'")
    if not version.startswith(_TORCH + "."):
        return Finding(section, "torch", "warn", version, f"Pangu is tested with torch {_TORCH}")
    return Finding(section, "torch", "pass", version)


def _torch_npu(section: str, machine: Machine) -> Iterator[Finding]:
    version = _version("torch-npu")
    if version is None:
        if machine.has_npu:
            yield Finding(section, "torch_npu", "fail", "not installed", "pip install 'pangu[npu]'")
        else:
            yield Finding(section, "torch_npu", "info", "not installed; this machine shows no NPU")
        return
    torch = _version("torch") or ""
    if version.split(".")[:2] != torch.split(".")[:2]:
        fix = f"pip install 'torch-npu=={'.'.join(torch.split('.')[:2])}.*'"
        yield Finding(section, "torch_npu", "fail", f"{version}, for another torch than {torch}", fix)
        return
    if not machine.has_npu:
        autoload = machine.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0"
        fix = "export TORCH_DEVICE_BACKEND_AUTOLOAD=0, or `import torch` fails where CANN is missing"
        yield Finding(section, "torch_npu", "pass" if autoload else "warn", version, "" if autoload else fix)
        return
    code = "import torch_npu, torch; print('devices', torch.npu.device_count())"
    environment = dict(machine.environ) | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    count = re.search(r"^devices (\d+)$", done.stdout, re.MULTILINE)
    if count is None:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(section, "torch_npu", "fail", f"{version} does not load: {reason}", "source CANN's set_env.sh")
    elif count[1] == "0":
        yield Finding(section, "torch_npu", "fail", f"{version} finds no device", _DRIVER_DOCS)
    else:
        yield Finding(section, "torch_npu", "pass", f"{version}, finds {count[1]} devices")


def _cann(machine: Machine) -> Iterator[Finding]:
    section, name = "software", "CANN"
    home = machine.environ.get("ASCEND_HOME_PATH") or machine.environ.get("ASCEND_TOOLKIT_HOME")
    installed = [machine.root / "usr/local/Ascend" / folder for folder in ("cann", "ascend-toolkit/latest")]
    folders = [Path(home)] if home else [folder for folder in installed if folder.is_dir()]
    if not folders:
        if machine.has_npu:
            yield Finding(section, name, "fail", "not installed", "install the CANN toolkit and its operator package")
        else:
            yield Finding(section, name, "info", "not installed; only needed with NPUs")
        return
    files = sorted(folders[0].glob("*-linux/ascend_toolkit_install.info"))
    found = re.search(r"^version=(\S+)", files[0].read_text(), re.MULTILINE) if files else None
    version = f"{found[1] if found else 'version unknown'} in {folders[0]}"
    if home:
        yield Finding(section, name, "pass" if found else "warn", version, "" if found else "is that CANN's folder?")
    else:
        where = folders[0] / "set_env.sh" if (folders[0] / "set_env.sh").exists() else folders[0].parent / "set_env.sh"
        yield Finding(section, name, "fail" if machine.has_npu else "warn", f"{version}, not in use", f"source {where}")


# ---- hardware


def _driver(machine: Machine) -> Iterator[Finding]:
    section = "devices"
    if not machine.has_npu:
        yield Finding(section, "NPUs", "info", "none: there is no /dev/davinci0")
        yield from _gpus(section)
        return
    yield _device_files(section, machine)
    works, text = npu_smi.run("info")
    info = npu_smi.parse_info(text) if works else None
    if info is None or not info.chips:
        yield Finding(
            section, "driver", "fail", text.splitlines()[-1] if text else "npu-smi says nothing", _DRIVER_DOCS
        )
        return
    yield _driver_version(section, info)
    yield from _chips(section, info, machine)
    yield _links(section, len(info.chips))
    yield from _network_ports(section, machine)


def _device_files(section: str, machine: Machine) -> Finding:
    paths = [machine.root / name for name in _DEVICE_NODES] + machine.npu_nodes
    missing = [str(path) for path in paths if not os.access(path, os.R_OK | os.W_OK)]
    if missing:
        fix = "give the user (group HwHiAiUser) or the container (docker run --device PATH) access to them"
        return Finding(section, "device files", "fail", f"no access to {', '.join(missing)}", fix)
    return Finding(section, "device files", "pass", f"{len(machine.npu_nodes)} NPUs and their manager")


def _driver_version(section: str, info: npu_smi.Info) -> Finding:
    works, text = npu_smi.run("info", "-t", "board", "-i", str(info.chips[0].card))
    board = npu_smi.parse_board(text) if works else {}
    version = board.get("Software Version") or info.driver
    found = f"{version}, firmware {board['Firmware Version']}" if "Firmware Version" in board else version
    if board.get("Compatibility", "OK") != "OK":
        return Finding(
            section, "driver", "fail", f"{found}, not compatible", "install driver and firmware of one release"
        )
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if numbers < _OLDEST_DRIVER:
        fix = "update it, or set PYTORCH_NPU_ALLOC_CONF=expandable_segments:False"
        return Finding(section, "driver", "warn", f"{found}, older than 23.0.0", fix)
    return Finding(section, "driver", "pass", found)


def _chips(section: str, info: npu_smi.Info, machine: Machine) -> Iterator[Finding]:
    names = ", ".join(sorted({chip.name for chip in info.chips}))
    ill = [f"NPU {chip.card} ({chip.bus}) {chip.health}" for chip in info.chips if chip.health != "OK"]
    visible = machine.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    shown = f"; ASCEND_RT_VISIBLE_DEVICES={visible}" if visible is not None else ""
    fix = "see `npu-smi info -t health -i N`, and leave it out by ASCEND_RT_VISIBLE_DEVICES"
    yield Finding(
        section,
        "NPUs",
        "fail" if ill else "pass",
        f"{len(info.chips)} x {names}{shown}" + "".join(f"; {text}" for text in ill),
        fix if ill else "",
    )
    least = min(chip.memory_total_mb - chip.memory_used_mb for chip in info.chips)
    yield Finding(
        section,
        "device memory",
        "pass",
        f"{info.chips[0].memory_total_mb / 1024:.0f} GiB each, at least {least / 1024:.1f} free",
    )
    if info.processes:
        holders = ", ".join(f"{p.pid} ({p.name}) on NPU {p.card}" for p in info.processes[:8])
        yield Finding(section, "processes", "warn", holders, "other processes hold memory of devices; end them or wait")


def _links(section: str, num_chips: int) -> Finding:
    name = "links"
    if num_chips == 1:
        return Finding(section, name, "info", "one device has none")
    works, text = npu_smi.run("info", "-t", "topo")
    links = npu_smi.parse_topology(text) if works else {}
    if not links:
        return Finding(section, name, "warn", "npu-smi shows no topology", "update the driver to see the links")
    kinds = sorted(set(links.values()))
    slow = sorted({"-".join(sorted(pair)) for pair, kind in links.items() if kind not in npu_smi.FAST_LINKS})
    if slow:
        found = f"{', '.join(kinds)}; {len(slow)} pairs without HCCS, such as {slow[0]}"
        return Finding(section, name, "warn", found, "keep tensor-parallel groups on devices that HCCS connects")
    return Finding(section, name, "pass", f"{', '.join(kinds)} between all pairs")


def _network_ports(section: str, machine: Machine) -> Iterator[Finding]:
    if shutil.which("hccn_tool") is None:
        yield Finding(section, "network ports", "info", "not seen: hccn_tool is not there")
        return
    down = []
    for node in machine.npu_nodes:
        number = node.name.removeprefix("davinci")
        if "UP" not in _output("hccn_tool", "-i", number, "-link", "-g"):
            down.append(number)
    fix = "check cable and switch (hccn_tool -i N -link_stat -g); jobs of one node work without"
    found = f"link down on NPU {', '.join(down)}" if down else "all links up"
    yield Finding(section, "network ports", "warn" if down else "pass", found, fix if down else "")


def _gpus(section: str) -> Iterator[Finding]:
    listed = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    for line in listed.splitlines():
        yield Finding(section, "GPU", "pass", line)


def _memory(machine: Machine) -> Iterator[Finding]:
    section = "host"
    meminfo = machine.root / "proc/meminfo"
    if meminfo.exists():  # not on macOS
        kib = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.MULTILINE))
        total, free = int(kib["MemTotal"]) / 2**20, int(kib["MemAvailable"]) / 2**20
        fix = "" if free >= 4 else "training reads data and writes checkpoints through host memory; free some"
        yield Finding(section, "memory", "pass" if free >= 4 else "warn", f"{total:.1f} GiB, {free:.1f} available", fix)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(section, "processor", "pass", f"{platform.machine()}, {cores} cores")
    try:
        shared = shutil.disk_usage(machine.root / "dev/shm").free / 2**30
    except OSError:
        shared = 0.0
    fix = "" if shared >= 1 else "enlarge /dev/shm (docker run --shm-size 16g): processes of a node talk through it"
    yield Finding(section, "shared memory", "pass" if shared >= 1 else "warn", f"{shared:.1f} GiB free", fix)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """What a command prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
