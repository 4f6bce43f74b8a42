"""The doctor's comparison of operators knows all of them, and sees one that is wrong."""

from typing import Any

import pangu_kernels
import pytest
import torch

from pangu import config as configuration
from pangu.doctor import parity

MODEL = configuration.load("debug").model
CPU = torch.device("cpu")


def results() -> dict[tuple[str, str], parity.Parity]:
    return {(result.operator, result.dtype): result for result in parity.compare(MODEL, CPU, exact=True)}


def test_every_operator_passes_on_this_cpu() -> None:
    found = results()
    assert [name for name, result in found.items() if not result.passed] == []
    assert {dtype for _, dtype in found} == {"fp32", "bf16"}


def test_every_operator_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    for name in pangu_kernels.__all__:
        function = getattr(pangu_kernels, name)

        def spy(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            called.add(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(pangu_kernels, name, spy)
    results()
    assert called == set(pangu_kernels.__all__)


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            return y.view_as(y)

        @staticmethod
        def backward(ctx: Any, d_y: torch.Tensor) -> torch.Tensor:
            return d_y * (1.001 if d_y.dtype == torch.float32 else 1)

    right = pangu_kernels.swiglu
    monkeypatch.setattr(pangu_kernels, "swiglu", lambda x: Wrong.apply(right(x)))
    found = results()
    assert [name for name, result in found.items() if not result.passed] == [("swiglu", "fp32")]


@pytest.mark.parametrize("value", [float("nan"), None])
def test_nan_and_errors_do_not_pass(value: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        if value is None:
            raise RuntimeError("aclnnSwiGlu failed, error code 561103")
        return x * value

    monkeypatch.setattr(pangu_kernels, "swiglu", broken)
    result = results()["swiglu", "fp32"]
    assert not result.passed
    assert value is not None or "RuntimeError: aclnnSwiGlu failed" in result.message


def test_a_model_of_another_kind_has_its_own_sizes() -> None:
    cases = {case.operator: case for case in parity.cases(configuration.load("yuan2_2b").model)}
    assert cases["rms_norm"].shapes[0][1] == 2048
    assert cases["swiglu"].shapes[0][1] == 2 * configuration.load("yuan2_2b").model.intermediate_size
    assert cases["local_filter"].shapes[0][1] == 1024, "matrices are capped"
