from collections.abc import Callable, Iterator

import pytest
from world import World


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[[int], World]]:
    """The world of so many gloo processes, shared by all tests."""
    started: dict[int, World] = {}

    def world(size: int) -> World:
        if size not in started:
            started[size] = World(size)
        return started[size]

    yield world
    for each in started.values():
        each.close()
