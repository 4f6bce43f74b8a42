"""Every layout trains as one device does: loss, every gradient, gradient norm, weights after five steps, validation."""

import functools
from collections.abc import Callable

import cases
import pytest
from equality import Result, errors, load, merge, train_steps
from world import World

TOLERANCE = 1e-5
BF16_NOISE = 3.0
"""How much farther from fp32 than on one device a layout may be in bf16."""


Record = Callable[[str, object], None]
"""pytest's `record_property`: what is recorded here makes up the table at the end of the test run (see conftest)."""


@functools.cache
def on_one_device(overrides: tuple[str, ...]) -> Result:
    return train_steps(load(*overrides))


def of_the_model(overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Overrides without those of the layout."""
    pairs = zip(overrides[::2], overrides[1::2], strict=True)
    return tuple(word for pair in pairs if not pair[0].startswith("--parallel.") for word in pair)


def run(world: World, overrides: tuple[str, ...]) -> Result:
    return merge(world.run(train_steps, load(*overrides)))


def check(name: str, result: Result, overrides: tuple[str, ...], record_property: Record) -> None:
    found = errors(result, on_one_device(of_the_model(overrides)))
    record_property(name, found.row())
    assert found.worst < TOLERANCE, found


@pytest.mark.parametrize("name", cases.FOUR)
def test_four_ranks_equal_one(name: str, worlds: Callable[[int], World], record_property: Record) -> None:
    overrides = cases.FOUR[name]
    check(name, run(worlds(4), overrides), overrides, record_property)


@pytest.mark.ascend
@pytest.mark.parametrize("name", cases.FOUR)
def test_four_emulated_npus_equal_one_cpu(name: str, worlds: Callable[..., World], record_property: Record) -> None:
    overrides = cases.FOUR[name]
    result = merge(worlds(4, "npu").run(train_steps, load(*overrides), "npu"))
    check(f"{name}, emulated NPUs", result, overrides, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.EIGHT)
def test_eight_ranks_equal_one(name: str, worlds: Callable[[int], World], record_property: Record) -> None:
    overrides = cases.EIGHT[name]
    check(name, run(worlds(8), overrides), overrides, record_property)


@pytest.mark.parametrize("name", ["tp2 x dp2, lfa", "zero 2", "pp2 interleaved", "cp4 ring"])
def test_bf16_is_as_near_to_fp32_as_one_device(
    name: str, worlds: Callable[[int], World], record_property: Record
) -> None:
    overrides = cases.FOUR[name]
    exact = on_one_device(of_the_model(overrides))
    noise = errors(on_one_device(of_the_model(overrides + cases.BF16)), exact)
    here = errors(run(worlds(4), overrides + cases.BF16), exact)
    record_property(f"{name}, bf16 (against fp32)", here.row())
    assert here.gradient < BF16_NOISE * noise.gradient
    assert here.weight < BF16_NOISE * noise.weight
    assert max(here.loss, here.norm) < BF16_NOISE * max(noise.loss, noise.norm)
