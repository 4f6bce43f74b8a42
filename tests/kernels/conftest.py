import pytest
import torch


def devices() -> list[str]:
    """Where the operators run on this machine: the same tests hold every implementation to the same numbers."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
