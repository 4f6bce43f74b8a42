import os
from collections.abc import Callable
from pathlib import Path

import pytest
from doctor_node import Node

from pangu.doctor import surface


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Without any device; programs of the node come before those of this machine."""
    for folder in ("root/dev/shm", "root/proc", "programs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "root/proc/meminfo").write_text("MemTotal:       65536000 kB\nMemAvailable:   60000000 kB\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}:{os.environ['PATH']}")
    return Node(tmp_path / "root", tmp_path / "programs", {})


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that distributions are installed in these versions, or not."""

    def pretend(**found: str | None) -> None:
        monkeypatch.setattr(surface, "_version", lambda name: found.get(name.replace("-", "_")))

    return pretend
