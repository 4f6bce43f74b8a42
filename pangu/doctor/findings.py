"""What the doctor finds: one line of the table, and one object of the JSON report."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Status = Literal["pass", "warn", "fail", "info"]

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "info": "dim"}


@dataclass(frozen=True)
class Finding:
    """status info is for what is neither good nor bad, such as a device that this machine does not have."""

    section: str
    name: str
    status: Status
    found: str
    fix: str = ""


def failed(findings: Iterable[Finding]) -> bool:
    return any(finding.status == "fail" for finding in findings)


def show(findings: Iterable[Finding], console: Console) -> None:
    """The findings as a table, a rule between sections, and what to do about those that did not pass."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("", "what", "found", "fix"):
        table.add_column(name, overflow="fold")
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            table.add_row("", f"[bold]{escape(section)}[/bold]")
        colour = _COLOURS[finding.status]
        status = f"[{colour}]{finding.status}[/{colour}]"
        table.add_row(status, escape(finding.name), escape(finding.found), escape(finding.fix))
    console.print(table)
