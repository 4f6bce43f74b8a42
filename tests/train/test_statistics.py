"""Layer statistics are those of the activations themselves, and watching changes nothing."""

import pytest
import torch
from torch import Tensor, nn

from pangu.train.statistics import NORMS, LayerStatistics


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))


class Layer(nn.Module):
    def __init__(self, sandwich: bool) -> None:
        super().__init__()
        self.attention, self.feed_forward = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention_norm, self.feed_forward_norm = Norm(), Norm()
        self.post_attention_norm = Norm() if sandwich else None
        self.post_feed_forward_norm = Norm() if sandwich else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x * self.attention_norm.weight)
        return x + self.feed_forward(x * self.feed_forward_norm.weight)


class Model(nn.Module):
    def __init__(self, sandwich: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({str(i): Layer(sandwich) for i in range(3)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def micro_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(tokens, 8, generator=generator) + offset for tokens, offset in ((5, 0.0), (9, 3.0), (2, -40.0))]


def test_activations_are_aggregated_over_micro_batches() -> None:
    model = Model()
    outputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("attention", "feed_forward")):
            module.register_forward_hook(lambda _, __, y, name=name: outputs.setdefault(name, []).append(y.detach()))
    with LayerStatistics([model]).record() as statistics:
        for x in micro_batches():
            model(x)
    result = statistics.result()
    assert result is not None
    assert result["layers"] == [0, 1, 2]
    for name in ("attention", "feed_forward"):
        for layer in range(3):
            values = torch.cat([y.flatten() for y in outputs[f"layers.{layer}.{name}"]]).double()
            found = {key: column[layer] for key, column in result["activations"][name].items()}
            assert found["mean"] == pytest.approx(values.mean().item(), rel=1e-5)
            assert found["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-5)
            assert found["max"] == values.abs().max().item()


def test_gains_of_the_norms_that_exist() -> None:
    for sandwich, names in ((True, NORMS), (False, ("attention_norm", "feed_forward_norm"))):
        model = Model(sandwich)
        with LayerStatistics([model]).record() as statistics:
            model(micro_batches()[0])
        result = statistics.result()
        assert result is not None
        assert tuple(result["gains"]) == names
        weight = model.get_parameter("layers.2.feed_forward_norm.weight")
        assert result["gains"]["feed_forward_norm"]["mean"][2] == pytest.approx(weight.mean().item())
        assert result["gains"]["feed_forward_norm"]["std"][2] == pytest.approx(weight.std(correction=0).item())


def test_watching_changes_no_result_and_leaves_no_hook() -> None:
    model = Model()
    x = micro_batches()[0]
    expected = model(x)
    expected.sum().backward()
    gradients = [parameter.grad for parameter in model.layers["0"].attention.parameters()]
    model.zero_grad()
    with LayerStatistics([model]).record():
        found = model(x)
    found.sum().backward()
    assert torch.equal(found, expected)
    assert all(map(torch.equal, gradients, [p.grad for p in model.layers["0"].attention.parameters()]))
    assert not any(module._forward_hooks for module in model.modules())


def test_inactive_recording_has_no_result() -> None:
    model = Model()
    statistics = LayerStatistics([model])
    with statistics.record():
        model(micro_batches()[0])
    with statistics.record(active=False):
        assert not any(module._forward_hooks for module in model.modules())
        model(micro_batches()[0])
    assert statistics.result() is None


def test_bf16_outputs_are_measured_in_fp32() -> None:
    model = Model().bfloat16()
    with LayerStatistics([model]).record() as statistics:
        output = model.layers["0"].attention(torch.randn(500, 8).bfloat16() + 100)
        model.layers["0"].feed_forward(output)
        for index in ("1", "2"):
            model.layers[index](output)
    result = statistics.result()
    assert result is not None
    expected = output.double().std(correction=0).item()
    assert result["activations"]["attention"]["std"][0] == pytest.approx(expected, rel=1e-5)
