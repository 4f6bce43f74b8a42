"""Machines made of files, for the doctor to look at."""

import stat
from dataclasses import dataclass
from pathlib import Path

import recorded

from pangu import config as configuration
from pangu.doctor import surface
from pangu.doctor.findings import Finding


@dataclass
class Node:
    """A machine made of files: a root folder, and programs that print what was recorded."""

    root: Path
    programs: Path
    environ: dict[str, str]

    def program(self, name: str, **answers: str) -> None:
        """An executable that prints, for arguments joined by underscores, the answer; else nothing, and fails."""
        cases = []
        for arguments, answer in answers.items():
            (self.programs / f"{name}.{arguments}").write_text(answer)
            cases.append(f'"{arguments.replace("_", " ")}") cat "$0.{arguments}";;')
        path = self.programs / name
        path.write_text('#!/bin/sh\ncase "$(echo $* | tr -d -)" in\n' + "\n".join(cases) + "\n*) exit 1;;\nesac\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def npus(self, count: int, info: str, topology: str = recorded.TOPOLOGY_A2, board: str = recorded.BOARD) -> None:
        for name in ("davinci_manager", "devmm_svm", "hisi_hdc", *(f"davinci{index}" for index in range(count))):
            (self.root / "dev" / name).touch()
        self.program("npu-smi", info=info, info_t_topo=topology, info_t_board_i_0=board)

    def cann(self, version: str = "8.5.0") -> Path:
        folder = self.root / "usr/local/Ascend/ascend-toolkit/latest"
        (folder / "x86_64-linux").mkdir(parents=True)
        (folder / "x86_64-linux" / "ascend_toolkit_install.info").write_text(
            f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100R001C20SPC001B251\narch=x86_64\n"
        )
        (folder.parent / "set_env.sh").touch()
        return folder

    def findings(self, *overrides: str) -> dict[str, Finding]:
        machine = surface.Machine(self.root, self.environ)
        found = surface.examine(configuration.load("debug", overrides), machine)
        return {finding.name: finding for finding in found}
