from collections.abc import Callable, Iterator
from typing import Any

import pytest
from world import World


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[..., World]]:
    """The world of so many processes, on the CPU or on emulated NPUs, shared by all tests."""
    started: dict[tuple[int, str], World] = {}

    def world(size: int, device: str = "cpu") -> World:
        if (size, device) not in started:
            started[size, device] = World(size, device)
        return started[size, device]

    yield world
    for each in started.values():
        each.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of `test_equality.py`, whichever processes ran its tests."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    rows = [row for report in reports if "test_equality" in report.nodeid for row in report.user_properties]
    if rows:
        columns = ("loss", "norm", "gradient", "weights")
        terminalreporter.section("relative error against one device")
        terminalreporter.write_line(" " * 50 + "".join(f"{column:>10}" for column in columns))
        for name, values in rows:
            terminalreporter.write_line(f"{name:50}" + "".join(f"{value:10.1e}" for value in values))
