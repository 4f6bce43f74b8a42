"""`pangu plan predict`: published rows, what they leave out, what cannot be read; and the accuracy on them."""

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pangu.cli import main
from pangu.errors import DataError
from pangu.plan.conventions import HARDWARE_FULL, MODEL_FULL, flops_per_token
from pangu.plan.job import Architecture
from pangu.plan.predict import load_rows, predict
from pangu.plan.rows import split_layers

ROOT = Path(__file__).resolve().parent.parent.parent
PUBLISHED = ROOT / "tests" / "plan" / "rows" / "published.yaml"


@pytest.fixture(scope="module")
def published() -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    rows, hardware = load_rows(PUBLISHED)
    return {row["id"]: row for row in rows}, hardware


def test_every_published_row_is_predicted_or_says_why_not(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert main(["plan", "predict", str(PUBLISHED), "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    rows, _ = load_rows(PUBLISHED)
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    for line in lines:
        assert ("step_time_s" in line) != ("step_time_s" in line["skipped"])
        assert ("fits" in line) != ("fits" in line["skipped"])
    assert sum("step_time_s" in line for line in lines) > 130


def test_figures_of_a_row_agree_with_one_another(published: Any) -> None:
    rows, hardware = published
    row = rows["smx-llama3_70b_tp2_pp1_dp4_l12_mbc4"]
    got = predict(row, hardware)
    assert got["tokens_per_s"] == pytest.approx(16 * 4096 / got["step_time_s"])
    assert got["tokens_per_s_per_chip"] == pytest.approx(got["tokens_per_s"] / 8)
    assert got["mfu"] == pytest.approx(got["tflops_per_chip"] / 2250)
    assert set(got["memory_per_rank_mib"]) == set(row["measured"]["memory_per_rank_mib"])
    assert got["memory_gib_alloc"] * 1024 == pytest.approx(got["memory_per_rank_mib"][0])
    assert got["fits"] is True


def test_the_flops_of_a_convention_are_its_papers() -> None:
    model = Architecture(96, 12288, 96, 96, 128, 49152, 51200, gated=False)
    s, h, layers, vocab = 2048, 12288, 96, 51200
    paper = 72 * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h))
    assert flops_per_token(model, s, MODEL_FULL) == pytest.approx(paper)
    paper = 96 * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    assert flops_per_token(model, s, HARDWARE_FULL) == pytest.approx(paper)


def test_the_bubbles_of_the_pangu_ultra_report(published: Any) -> None:
    rows, hardware = published
    got = predict(rows["pangu-ultra-bubble"], hardware)
    assert got["bubble_fraction_1f1b"] == pytest.approx(7 / 23)
    assert got["bubble_fraction_interleaved_vpp6"] == pytest.approx(7 / 103)
    assert "variant" in got["skipped"]["step_time_s"]


def test_korthikantis_shares_of_activation_memory(published: Any) -> None:
    rows, hardware = published
    for name in ("kort-actmem-22B", "kort-actmem-530B"):
        measured = rows[name]["measured"]["activation_pct_of_tp_baseline"]
        got = predict(rows[name], hardware)["activation_pct_of_tp_baseline"]
        assert {key: got[key] for key in measured} == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("layout", "mbs"), None, "micro-batch is not given"),
        (("layout", "gbs"), None, "gbs is not given"),
        (("layout", "tp"), None, "tp is not given"),
        (("model", "seq"), None, "seq is not given"),
        (("layout", "gbs"), 13, "not a multiple"),
        (("layout", "dp"), 3, "is not 8 chips"),
        (("hardware",), "nowhere", "no figures known for chip"),
        (("chips",), None, "chips is not given"),
        (("layout", "layers_per_stage"), "3,3,3", "12 layers on 1 stages"),
    ],
)
def test_a_row_that_leaves_something_out_says_what(published: Any, path: Any, value: Any, reason: str) -> None:
    rows, hardware = published
    row = copy.deepcopy(rows["smx-llama3_70b_tp2_pp1_dp4_l12_mbc4"])
    _put(row, path, value)
    got = predict(row, hardware)
    assert reason in got["skipped"]["step_time_s"]
    assert "step_time_s" not in got


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("layout", "tp"), "two", r"row 'smx.*tp must be a whole number from 1 on, got 'two'"),
        (("model", "hidden"), -8, "hidden must be a whole number"),
        (("layout", "pp"), 1.5, "pp must be a whole number"),
        (("layout", "zero"), 7, "zero must be a stage from 0 to 3"),
        (("layout", "layers_per_stage"), "six", "layers_per_stage must be numbers"),
    ],
)
def test_a_row_that_cannot_be_is_refused(published: Any, path: Any, value: Any, message: str) -> None:
    rows, hardware = published
    row = copy.deepcopy(rows["smx-llama3_70b_tp2_pp1_dp4_l12_mbc4"])
    _put(row, path, value)
    with pytest.raises(DataError, match=message):
        predict(row, hardware)


@pytest.mark.parametrize("value", [None, "what?", -1, [], {}, 3.5, True])
def test_no_single_field_of_a_row_crashes(published: Any, value: Any) -> None:
    """Whatever stands in one field, the row is predicted, left out with a reason, or refused by name."""
    rows, hardware = published
    for name in ("smx-llama3_70b_tp2_pp1_dp4_l12_mbc4", "ms-rc3-qwen15-4b-8k", "zb-1.5B-ZB2p-m24"):
        row = rows[name]
        row = {**row, "hardware": hardware[row["hardware"]]}
        paths = [(key,) for key in row if key != "id"]
        paths += [(table, key) for table in ("model", "layout", "measured", "hardware") for key in row[table]]
        for path in paths:
            changed = copy.deepcopy(row)
            _put(changed, path, value)
            said = _predicted_or_refused(changed)
            assert said == "predicted" or name in said, path


def _predicted_or_refused(row: dict[str, Any]) -> str:
    try:
        got = predict(row, {})
    except DataError as error:
        return str(error)
    return "predicted" if "step_time_s" in got or got["skipped"] else "nothing said"


def test_a_schedule_that_cannot_be_is_a_reason(published: Any) -> None:
    rows, hardware = published
    row = copy.deepcopy(rows["golden-gpt3_7b_tp1_pp4-dgx_a100_1node"])
    _put(row, ("layout", "gbs"), 18)
    assert "torch.distributed.pipelining" in predict(row, hardware)["skipped"]["step_time_s"]


def test_other_frameworks_run_fewer_micro_batches_than_ranks(published: Any) -> None:
    """1F1B of one micro-batch on 4 ranks: three quarters of the step idle."""
    rows, hardware = published
    row = copy.deepcopy(rows["ms-rc3-llama31-70b-8k"])
    _put(row, ("layout", "gbs"), 1)
    assert predict(row, hardware)["bubble_fraction_of_step"] == pytest.approx(0.75, abs=0.01)


def _put(row: Any, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        row = row[key]
    row[path[-1]] = value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: [", "expected"),
        ("about: {}", "no rows"),
        ("[1, 2]", "row 0 must be a table with an id"),
        ("[{id: x, model: {}}]", "row 'x': layout must be a table"),
        ("{hardware: [1], rows: [{id: x, model: {}, layout: {}}]}", "hardware must be a table|row 0"),
    ],
)
def test_a_file_that_is_no_rows_file_ends_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_rows(path)
    assert main(["plan", "predict", str(path), "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.yaml"):
        load_rows(tmp_path / "nothing.yaml")


def test_rows_may_carry_their_hardware(tmp_path: Path, published: Any) -> None:
    rows, hardware = published
    row = copy.deepcopy(rows["smx-llama3_70b_tp2_pp1_dp4_l12_mbc4"])
    row["hardware"] = hardware[row["hardware"]]
    path = tmp_path / "rows.yaml"
    path.write_text(yaml.safe_dump([row]))
    alone, none = load_rows(path)
    assert predict(alone[0], none)["step_time_s"] == predict(rows[row["id"]], hardware)["step_time_s"]


def test_layers_are_dealt_as_sources_deal_them() -> None:
    assert split_layers(22, 8) == (2, 3, 3, 3, 3, 3, 3, 2)  # zero bubble: one fewer at both ends
    assert split_layers(78, 12) == (*[7] * 11, 1)  # DeepSpeed: the last stage is short
    assert split_layers(10, 4) == (2, 3, 3, 2)
    assert split_layers(62, 64)[0] == split_layers(62, 64)[-1] == 0


def test_the_accuracy_is_what_was_asked_for() -> None:
    """On the rows that the constants were fitted to; benchmarks/planner_accuracy.py also leaves families out."""
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "planner_accuracy.py"))
    rows, hardware = load_rows(PUBLISHED)
    measurements = list(benchmark["measured_times"](rows, hardware))
    values = benchmark["np"].array([benchmark["_current"](name, on) for name, on, *_ in benchmark["PRIORS"]])
    report = benchmark["time_report"](measurements, values, False)["groups"]
    for vendor, mape in (("Ascend", 0.08), ("NVIDIA", 0.055)):
        assert report[vendor]["mape"] < mape
        assert abs(report[vendor]["bias"]) < 0.03
        assert report[vendor]["p90"] < 0.15
        assert (
            report[vendor]["mape"] < min(report[vendor][name] for name in ("median_mfu_mape", "nearest_mfu_mape")) / 2
        )
    assert all(group["spearman"] > 0.79 for group in benchmark["rank_report"](measurements, values).values())
    memory, fits = benchmark["memory_report"](rows, hardware)
    assert fits["verdicts"] > 100
    assert not fits["wrong"]
    assert memory["simumax_b200: peak, per rank"]["mape"] < 0.01
    assert memory["mindspeed_ci_memory: between steps, per rank"]["mape"] < 0.01
    assert memory["mindspeed_ci_memory: peak of the first step, per rank"]["mape"] < 0.03
    assert memory["torchtitan: reserved"]["mape"] < 0.02
    assert memory["megatron_golden: peak"]["mape"] < 0.01
