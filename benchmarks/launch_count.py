"""How many operators one transformer layer launches on an NPU, forward and backward: calls into CANN, counted.

    python benchmarks/launch_count.py [--output launch_count.json]

Needs torch_npu (`pip install -e '.[npu]'`) and no NPU: the genuine torch_npu runs on the emulated CANN, which records
every aclnn function that its host code calls. What CANN launches inside one call (copies of strided arguments, the
parts of a matmul) is not seen, here or in what we compare with.

`unfused` is the same model with each of our operators computed by its PyTorch reference; plain PyTorch is the block of
train_step.py in torch.nn.functional, of which torch_npu fuses what it can. Published stacks: the calls
of one Llama layer as their sources make them (published_layers.py), under torch_npu's own autograd. A layer of ours is
the difference between two layers and one. Weights are in the dtype of the activations, as FSDP's mixed precision hands
them to the layer; `master` keeps them in fp32, cast at every use.
"""

import pangu  # first: it keeps torch from loading torch_npu by itself

# isort: split
import argparse
import contextlib
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from published_layers import Sizes, Stack, stacks
from torch import Tensor
from train_step import Case, PlainBlock

from pangu.config import ModelConfig
from pangu.device.cann_emulator import Emulator, emulated_npu
from pangu.model import Transformer, init_weights

SIZES = Sizes(tokens=24, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
LAYERS: dict[str, dict[str, Any]] = {
    "sandwich norm": {"norm_placement": "sandwich"},
    "pre-norm": {"norm_placement": "pre"},
    "pre-norm with LFA": {
        "norm_placement": "pre",
        "local_filter": "two_convolutions_norm",
        "num_key_value_heads": SIZES.num_attention_heads,
    },
}
MODES = {"bf16": (torch.bfloat16, False), "bf16, master": (torch.bfloat16, True), "fp32": (torch.float32, False)}
FUSED = ("attention", "rms_norm", "rope", "sandwich_norm", "swiglu")
MATMULS = ("aclnnMm", "aclnnAddmm", "aclnnInplaceAddmm", "aclnnMatmul", "aclnnBatchMatMul")
TARGET = 0.6

Counts = dict[str, Counter[str]]
"""Launches by kernel, of `forward` and `backward`."""


@contextlib.contextmanager
def references() -> Iterator[None]:
    """Our operators, computed on the NPU by their references."""
    with torch.library._scoped_library("pangu", "IMPL") as library:
        for name in FUSED:
            reference = importlib.import_module(f"pangu_kernels.{name}.reference")
            library.impl(name, reference.forward, "PrivateUse1", allow_override=True)
            library.impl(f"{name}_backward", reference.backward, "PrivateUse1", allow_override=True)
        yield


def layer(emulator: Emulator, dtype: torch.dtype, master: bool, **model: Any) -> Counts:
    one, two = (launches(emulator, number, dtype, master, model) for number in (1, 2))
    return {part: two[part] - one[part] for part in one}


def launches(emulator: Emulator, num_layers: int, dtype: torch.dtype, master: bool, model: dict[str, Any]) -> Counts:
    config = ModelConfig(
        vocab_size=32,
        hidden_size=SIZES.hidden_size,
        num_layers=num_layers,
        num_attention_heads=SIZES.num_attention_heads,
        intermediate_size=SIZES.intermediate_size,
        **{"num_key_value_heads": SIZES.num_key_value_heads, **model},
    )
    with torch.device("npu"):
        transformer = Transformer(config)
    init_weights(transformer, seed=0)
    transformer.compute_dtype = dtype
    if not master:
        transformer.to(dtype)
    tokens = torch.arange(SIZES.tokens, device="npu")
    document = torch.tensor([0, SIZES.tokens], dtype=torch.int32)
    transformer(tokens, tokens, document)  # what is made once, such as attention's mask, is no layer's
    with emulator.record() as forward:
        hidden = transformer(tokens, tokens, document)
    with emulator.record() as backward:
        hidden.sum().backward()
    return {"forward": Counter(c.name for c in forward), "backward": Counter(c.name for c in backward)}


def published_layer(emulator: Emulator, stack: Stack) -> Counts:
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16, device="npu", requires_grad=True)
        for name, shape in stack.shapes.items()
    }
    x = torch.ones(*stack.leading, SIZES.hidden_size, dtype=torch.bfloat16, device="npu", requires_grad=True)
    return forward_and_backward(emulator, lambda: stack.layer(x, weights), [x, *weights.values()])


def plain_layer(emulator: Emulator) -> Counts:
    case = Case("layer", 32, SIZES.tokens, SIZES.hidden_size, 1, SIZES.num_attention_heads, SIZES.intermediate_size)
    block = PlainBlock(case).to("npu", torch.bfloat16)
    x = torch.ones(SIZES.tokens, SIZES.hidden_size, dtype=torch.bfloat16, device="npu", requires_grad=True)
    cos = torch.ones(SIZES.tokens, SIZES.head_dim, dtype=torch.bfloat16, device="npu")
    return forward_and_backward(emulator, lambda: block(x, cos, cos), [x, *block.parameters()])


def forward_and_backward(emulator: Emulator, run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Counts:
    with emulator.record() as forward:
        y = run()
    gradient = torch.ones_like(y)
    with emulator.record() as backward:
        torch.autograd.grad(y, inputs, gradient)
    return {"forward": Counter(c.name for c in forward), "backward": Counter(c.name for c in backward)}


def total(counts: Counts, kernels: tuple[str, ...] | None = None) -> int:
    return sum(
        number for part in counts.values() for kernel, number in part.items() if kernels is None or kernel in kernels
    )


def row(name: str, mode: str, counts: Counts, unfused: Counts | None) -> dict[str, Any]:
    return {
        "layer": name,
        "mode": mode,
        "forward": sum(counts["forward"].values()),
        "backward": sum(counts["backward"].values()),
        "total": total(counts),
        "matmuls": total(counts, MATMULS),
        "unfused": None if unfused is None else total(unfused),
        "ratio": None if unfused is None else total(counts) / total(unfused),
        "kernels": {part: dict(numbers.most_common()) for part, numbers in counts.items()},
    }


def count(emulator: Emulator) -> list[dict[str, Any]]:
    rows = []
    for name, model in LAYERS.items():
        for mode, (dtype, master) in MODES.items():
            fused = layer(emulator, dtype, master, **model)
            with references():
                unfused = layer(emulator, dtype, master, **model)
            rows.append(row(f"Pangu, {name}", mode, fused, unfused))
    rows.append(row("plain PyTorch, pre-norm", "bf16", plain_layer(emulator), None))
    for name, stack in stacks(SIZES).items():
        rows.append(row(f"{name}, pre-norm", "bf16", published_layer(emulator, stack), None) | {"source": stack.source})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with emulated_npu() as emulator:
        rows = count(emulator)
    columns = ("forward", "backward", "total", "matmuls", "unfused")
    print(f"{'launches per layer':<28}{'mode':<14}" + "".join(f"{name:>10}" for name in columns) + f"{'ratio':>8}")
    for each in rows:
        cells = "".join(f"{'' if each[name] is None else each[name]:>10}" for name in columns)
        ratio = "" if each["ratio"] is None else f"{each['ratio']:.0%}"
        print(f"{each['layer']:<28}{each['mode']:<14}{cells}{ratio:>8}")
    worst = max(each["ratio"] for each in rows if each["ratio"] is not None)
    print(f"\nlargest ratio {worst:.0%}, target at most {TARGET:.0%}")
    if options.output:
        result = {"pangu": pangu.__version__, "sizes": vars(SIZES), "target": TARGET, "rows": rows}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
