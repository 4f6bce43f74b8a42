"""Predictions of rows nobody measured: plausible everywhere, and moving the right way when one field changes."""

import copy
from typing import Any

import pytest

from pangu.plan.conventions import MODEL_CAUSAL, flops_per_token
from pangu.plan.predict import predict
from pangu.plan.rows import read_row

CHIPS = {
    "H100-SXM5-80GB": 989.0,
    "H800": 989.0,
    "A100-SXM4-80GB": 312.0,
    "A800": 312.0,
    "B200-SXM": 2250.0,
    "Ascend 910B2": 353.8944,
    "Ascend 910B3": 294.912,
    "Ascend 910_9392 (A3)": 353.8944,
}
FAMILIES = ("mindspeed_llm", "mindformers", "megatron", "nemo", "torchtitan", "llm_foundry", "internevo", "zero_bubble")
LLAMA3_8B = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 128256}
MODELS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "Qwen1.5-0.5B": (
        {"layers": 24, "hidden": 1024, "heads": 16, "kv_heads": 16, "ffn": 2816, "vocab": 151936},
        {"tp": 1, "pp": 1, "dp": 8},
    ),
    "Llama-3-8B": (LLAMA3_8B, {"tp": 1, "pp": 1, "dp": 8}),
    "Llama-3-70B": (
        {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "vocab": 128256},
        {"tp": 8, "pp": 4, "dp": 2},
    ),
    "Llama-3-405B": (
        {"layers": 126, "hidden": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248, "vocab": 128256},
        {"tp": 8, "pp": 9, "dp": 2},
    ),
}


def row(model: str = "Llama-3-70B", chip: str = "H100-SXM5-80GB", family: str = "megatron", **fields: Any) -> Any:
    """A row; `fields` go where the schema has them."""
    sizes, sharding = MODELS[model]
    built = {
        "id": "x",
        "family": family,
        "hardware": {"chip": chip, "peak_bf16_tflops": CHIPS[chip]},
        "precision": fields.pop("precision", "bf16"),
        "model": {"name": model, "gated_mlp": True, "seq": 4096, **sizes},
        "layout": {**sharding, "cp": 1, "mbs": 1, "gbs": 64, "vpp": 1, "sp": sharding["tp"] > 1, "zero": 1,
                   "recompute": "none", "flash_attn": True, "overlap": "grad-reduce + param-gather"},
    }  # fmt: skip
    for name, value in fields.items():
        built["model" if name in built["model"] else "layout"][name] = value
    layout = built["layout"]
    built["chips"] = layout["tp"] * layout["pp"] * layout["dp"] * layout["cp"]
    return built


def predicted(*names: str, **fields: Any) -> tuple[float, float]:
    """Step time and memory of the fullest rank."""
    got = predict(row(*names, **fields), {})
    return got["step_time_s"], got["memory_total_gib"]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mbs": 4, "recompute": "full"},
        {"seq": 32768, "recompute": "full", "gbs": 16},
        {"seq": 131072, "cp": 4, "recompute": "selective", "gbs": 16},
    ],
    ids=["plain", "mbs 4", "32K", "128K"],
)
def test_no_utilization_is_absurd(model: str, chip: str, fields: dict[str, Any]) -> None:
    """Model FLOPs with half of attention, the convention that stays below 1 whatever the sequence."""
    for family in FAMILIES if model == "Llama-3-8B" else ("megatron",):
        given = row(model, chip, family, **fields)
        read = read_row(given, {})
        got = predict(given, {})
        flops = flops_per_token(read.job.model, read.job.sequence_length, MODEL_CAUSAL)
        assert 0.05 < flops * got["tokens_per_s_per_chip"] / (CHIPS[chip] * 1e12) < 0.75, family
        assert 0 <= got["bubble_fraction_of_step"] < 0.6
        assert 1 < got["memory_total_gib"] < 3000


@pytest.mark.parametrize("chip", ["H100-SXM5-80GB", "A100-SXM4-80GB", "Ascend 910B2"])
@pytest.mark.parametrize(
    ("field", "values", "time", "memory"),
    [
        ("recompute", ("none", "selective", "full"), "rises", "falls"),
        ("seq", (4096, 8192, 32768), "rises", "rises"),
        ("mbs", (1, 2, 4), None, "rises"),
        ("gbs", (16, 64, 256), "rises", None),
        ("layers", (40, 80, 160), "rises", "rises"),
        ("ffn", (22016, 28672, 32768), "rises", "rises"),
        ("vocab", (32000, 128256, 256000), "rises", "rises"),
        ("kv_heads", (8, 16, 64), "rises", "rises"),
        ("cp", (1, 2, 4), "falls", "falls"),
        ("dp", (1, 2, 4), "falls", "falls"),
        ("zero", (0, 1), None, "falls"),
        ("vpp", (1, 2, 5), "falls", None),
        ("vpp", (2, 5, 10), None, "falls"),  # in flight: 1 + (p - 1) / (p v) times 1F1B's
        ("pp", (2, 4, 8), "falls", "falls"),
    ],
)
def test_one_field_moves_a_prediction_the_right_way(
    chip: str, field: str, values: tuple[Any, ...], time: str | None, memory: str | None
) -> None:
    """More chips of any kind make a step shorter, more work longer, at one batch size."""
    times, memories = zip(*(predicted("Llama-3-70B", chip, **{field: value}) for value in values), strict=True)
    for figures, expected in ((times, time), (memories, memory)):
        if expected:
            assert sorted(figures, reverse=expected == "falls") == list(figures)
            assert len(set(figures)) == len(figures)


def test_a_larger_batch_has_more_tokens_per_second() -> None:
    rates = [64 * n / predicted(gbs=64 * n)[0] for n in (1, 2, 4)]
    assert rates == sorted(rates)


@pytest.mark.parametrize("field", ["peak_bf16_tflops", "hbm_gbps"])
@pytest.mark.parametrize("model", MODELS)
def test_a_faster_chip_is_no_slower(model: str, field: str) -> None:
    slow, fast = row(model), row(model)
    slow["hardware"] |= {"peak_bf16_tflops": 500, "hbm_gbps": 2000}
    fast["hardware"] |= {"peak_bf16_tflops": 500, "hbm_gbps": 2000} | {field: 4000}
    assert predict(fast, {})["step_time_s"] < predict(slow, {})["step_time_s"]


def test_a_faster_network_is_no_slower() -> None:
    steps = []
    for rate in (50, 100, 200, 400, 800):
        given = row(overlap=None)
        given["hardware"]["inter"] = {"kind": "InfiniBand", "Gbps_per_chip": rate}
        steps.append(predict(given, {})["step_time_s"])
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < steps[0]


def test_fp8_is_faster_where_matmuls_are_large() -> None:
    for chip in ("H100-SXM5-80GB", "B200-SXM"):
        fp8, bf16 = (predicted("Llama-3-405B", chip, precision=precision)[0] for precision in ("fp8", "bf16"))
        assert 0.5 < fp8 / bf16 < 0.95


def test_tensor_parallelism_of_two_wastes_the_links_of_a_full_mesh() -> None:
    """One of seven links: what TP 8 exchanges in one time TP 2 takes longer for than behind a switch."""

    def loss(chip: str) -> float:
        one, two = (predicted("Llama-3-8B", chip, tp=tp, dp=8 // tp, sp=tp > 1)[0] for tp in (1, 2))
        return two / one

    assert loss("Ascend 910B2") > loss("A100-SXM4-80GB")


def test_fields_that_do_not_matter_do_not() -> None:
    """Names, sources and notes change nothing for a family that is known."""
    plain = row(family="torchtitan")
    noted = copy.deepcopy(plain) | {"kind": "memory", "confidence": "low", "source": {"title": "a report"}}
    noted["model"]["note"] = "as released"
    assert predict(plain, {})["step_time_s"] == predict(noted, {})["step_time_s"]
