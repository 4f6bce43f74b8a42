"""Predictions stand beside measurements in a run's events, and can be fitted to them."""

from pathlib import Path

import pytest

from pangu.cli import main
from pangu.train.events import read_events


def test_a_run_reports_what_was_expected(tmp_path: Path) -> None:
    overrides = ["--metrics.cluster", "atlas_800t_a2", "--metrics.tensorboard", "false", "--train.steps", "2"]
    assert main(["train", "debug", "--output", str(tmp_path / "run"), *overrides]) == 0
    for event in read_events(tmp_path / "run"):
        measured = event["stage_seconds"]
        assert sum(measured.values()) == pytest.approx(event["seconds"])
        assert sum(event["predicted_stage_seconds"].values()) == pytest.approx(event["predicted_seconds"])
        assert event["predicted_memory_bytes"] > 0
        assert event["predicted_mfu"] > 0
        # What is not told apart when measuring is compared as one: the reduction belongs to forward and backward.
        predicted = event["predicted_stage_seconds"]
        both = predicted["forward_backward"] + predicted["gradient_reduction"]
        assert event["difference_seconds"]["forward_backward"] == pytest.approx(measured["forward_backward"] - both)


def test_an_unknown_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "debug", "--output", str(tmp_path / "run"), "--metrics.cluster", "atlas_800_a2"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
