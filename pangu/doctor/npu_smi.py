"""What `npu-smi` prints, as data: Ascend's driver has no other interface that is there before CANN is."""

import re
import shutil
import subprocess
from dataclasses import dataclass

FAST_LINKS = ("HCCS", "HCCS_SW", "SIO")
"""Links between devices that do not go through the host: HCCS, HCCS through a switch, and two dies of one package."""

_BUS = re.compile(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d")
_USAGE = re.compile(r"(\d+)\s*/\s*(\d+)")
_PROCESS = re.compile(r"\|\s*(\d+)\s+(\d+)\s*\|\s*(\d+)\s*\|\s*(.*?)\s*\|\s*(\d+)\s*\|")
_VERSION = re.compile(r"npu-smi\s+(\S+)\s+Version:\s*(\S+)")


@dataclass(frozen=True)
class Chip:
    """One chip, which is one device of torch_npu; a card of Atlas A3 has two."""

    card: int
    name: str
    health: str
    temperature_c: int | None
    bus: str
    memory_used_mb: int
    memory_total_mb: int


@dataclass(frozen=True)
class Process:
    """A process that holds memory of a chip."""

    card: int
    chip: int
    pid: int
    name: str
    memory_mb: int


@dataclass(frozen=True)
class Info:
    """`npu-smi info`."""

    driver: str
    chips: tuple[Chip, ...]
    processes: tuple[Process, ...]


def run(*arguments: str, timeout: float = 60.0) -> tuple[bool, str]:
    """Whether `npu-smi ARGUMENTS` succeeded, and what it printed; an explanation if there is no npu-smi."""
    if shutil.which("npu-smi") is None:
        return False, "npu-smi is not there: the driver is not installed, or not mounted into this container"
    try:
        done = subprocess.run(["npu-smi", *arguments], capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.SubprocessError) as error:
        return False, str(error)
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def parse_info(text: str) -> Info:
    """Of the table of Atlas A2, of A3 (two chips per card, with a column Phy-ID) and of Ascend 950 (more columns)."""
    version = _VERSION.search(text)
    devices, _, processes = text.partition("Process id")
    chips: list[Chip] = []
    card = name = health = numbers = ""
    for line in devices.splitlines():
        *first, second, third = ["", "", *(cell.strip() for cell in line.strip().strip("|").split("|"))]
        words = " ".join(first).split()
        if _BUS.fullmatch(second) and name:
            used, total = (_USAGE.findall(third) or [("0", "0")])[-1]  # of HBM; memory of another kind stands before it
            temperature = [*numbers.split(), "-", "-"][1]
            chips.append(
                Chip(
                    card=int(card),
                    name=name,
                    health=health,
                    temperature_c=int(temperature) if temperature.isdigit() else None,
                    bus=second,
                    memory_used_mb=int(used),
                    memory_total_mb=int(total),
                )
            )
            name = ""
        elif len(words) == 2 and words[0].isdigit():
            (card, name), health, numbers = words, second, third
    holders = tuple(
        Process(int(card), int(chip), int(pid), name, int(memory_mb))
        for card, chip, pid, name, memory_mb in _PROCESS.findall(processes)
    )
    return Info(version[2] if version else "", tuple(chips), holders)


def parse_board(text: str) -> dict[str, str]:
    """`npu-smi info -t board -i N`: field by field, such as "Software Version" (of the driver)."""
    fields = (line.partition(":") for line in text.splitlines() if " : " in line or line.rstrip().endswith(":"))
    return {name.strip(): value.strip() for name, _, value in fields}


def parse_topology(text: str) -> dict[tuple[str, str], str]:
    """`npu-smi info -t topo`: the kind of link between every two devices, such as HCCS or PHB."""
    header: list[str] = []
    links: dict[tuple[str, str], str] = {}
    for line in text.splitlines():
        words = line.split()
        if not words or words[0] == "Legend:":
            if links:
                break
            continue
        if not header:
            header = [word for word in words if re.fullmatch(r"(NPU|Phy-ID)\d+", word)]
        elif words[0] in header:
            for name, link in zip(header, words[1:], strict=False):
                if name != words[0]:
                    links[words[0], name] = link
    return links
