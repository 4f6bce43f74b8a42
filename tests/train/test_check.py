"""Impossible layouts are refused on one process, with the arithmetic, and possible ones described."""

import pytest

from pangu import config as configuration
from pangu.cli import main
from pangu.errors import ConfigError
from pangu.train.check import check

TP4 = ("--parallel.tp", "4")

IMPOSSIBLE = {
    "heads": (["--parallel.tp", "3"], r"model.num_attention_heads 4 is not divisible by parallel.tp 3 \(remainder 1\)"),
    "key heads": (
        ["--model.num_attention_heads", "12", "--model.num_key_value_heads", "6", "--model.head_dim", "16", *TP4],
        r"num_key_value_heads 6 can neither be dealt over parallel.tp 4",
    ),
    "vocabulary": (["--model.vocab_size", "511", "--parallel.tp", "2"], "model.vocab_size 511 is not divisible"),
    "more stages than layers": (
        ["--parallel.pp", "8"],
        r"parallel.pp 8 x pipeline_stages_per_rank 1 = 8 stages, but the model has only 4 layers",
    ),
    "sum of layers": (
        ["--parallel.pp", "2", "--parallel.pipeline_layers", "[2, 3]"],
        r"pipeline_layers must be 2 positive numbers with the sum 4",
    ),
    "stages of a schedule": (
        ["--parallel.pp", "2", "--parallel.pipeline_schedule", "zero_bubble_v"],
        "'zero_bubble_v' needs parallel.pipeline_stages_per_rank 2, got 1",
    ),
    "batch": (
        ["--parallel.dp_shard", "4"],
        r"batch_size 4 is not divisible by train.micro_batch_size 2 x 4 data-parallel ranks = 8 \(remainder 4\)",
    ),
    "sequence": (
        ["--parallel.cp", "3", "--parallel.dp_shard", "1"],
        r"phases.0.sequence_length 128 x train.micro_batch_size 2 = 256 is not divisible by parallel.cp x tp 3",
    ),
    "micro-batches": (
        ["--parallel.pp", "4"],
        r"phases.0.batch_size 4 / \(train.micro_batch_size 2 x 1 data-parallel ranks\) = 2 micro-batches",
    ),
    "nodes": (
        ["--parallel.tp", "4", "--parallel.devices_per_node", "2"],
        "ranks 0 to 3 would span nodes; choose a tp that divides devices_per_node, or set parallel.tp_across_nodes",
    ),
    "filter": (
        ["--model.local_filter", "convolution_3", "--model.num_key_value_heads", "4", "--parallel.tp", "2"],
        "'convolution_3' has no tensor-parallel form",
    ),
    "recompute": (
        ["--parallel.recompute.layers", "[1, 2]"],
        "parallel.recompute.layers has 2 entries for parallel.pp 1",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, message = IMPOSSIBLE[case]
    with pytest.raises(ConfigError, match=message):
        check(configuration.load("debug", overrides))
    assert main(["train", "debug", "--check", *overrides]) == 2
    assert capsys.readouterr().out == ""


def test_a_world_of_another_size() -> None:
    config = configuration.load("debug", ["--parallel.tp", "2", "--parallel.dp_shard", "2"])
    with pytest.raises(ConfigError, match=r"= 4 ranks, but 6 were started"):
        check(config, 6)
    with pytest.raises(ConfigError, match=r"5 ranks are not a multiple of .* = 2"):
        check(configuration.load("debug", ["--parallel.tp", "2"]), 5)


def test_pangu_ultra_on_8192_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """94 layers over 8 x 6 stages: 46 of two, and one in the first and last, which have the tables to carry."""
    layout = ["--parallel.pp", "8", "--parallel.tp", "8", "--parallel.pipeline_stages_per_rank", "6"]
    schedule = ["--parallel.pipeline_schedule", "interleaved_1f1b", "--data.synthetic", "true", "--data.domains", "{}"]
    phases = '[{name = "general", sequence_length = 4096, batch_size = 2048, learning_rate = 1e-4}]'
    arguments = ["train", "pangu_ultra_135b", "--check", "--world-size", "8192", *layout, *schedule]
    arguments += ["--phases", phases, "--train.steps", "10", "--data.tokenizer", ""]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "16 micro-batches per rank" in out
    assert "1+2+2+2+2+2, 2+2+2+2+2+2," in out
    assert "2+2+2+2+2+1" in out
