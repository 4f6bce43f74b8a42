"""Plots show the events of every run, and refuse folders that have nothing to show."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pangu.errors import PanguError
from pangu.train import plot as plot_module
from pangu.train.events import EventLog
from pangu.train.plot import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_run(run: Path, steps: int = 20, sandwich: bool = True, statistics: bool = True) -> Path:
    norms = ["attention_norm", "feed_forward_norm"] + ["post_attention_norm"] * sandwich
    log = EventLog(run)
    for step in range(1, steps + 1):
        loss = math.nan if step == 3 else 5 / step
        log.write("step", step, tokens=1000 * step, loss=loss, grad_norm=1 / step, lr=1e-3)
        if statistics and step % 2 == 0:
            log.write(
                "statistics",
                step,
                layers=[0, 1, 2],
                activations={name: {key: [step, 2, 3] for key in ("mean", "std", "max")} for name in ("attention",)},
                gains={name: {"mean": [1, 1, 0.5 * step], "std": [0, 0, 0.1]} for name in norms},
            )
        if step % 5 == 0:
            log.write("validation", step, losses={"code": 4 / step, "english": 6 / step})
    log.close()
    return run


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> "dict[str, Figure]":
    """The figures that `plot` draws, by file name, in place of their PNGs."""
    drawn: dict[str, Figure] = {}

    def keep(figure: "Figure", path: Path) -> Path:
        drawn[path.name] = figure
        return path

    monkeypatch.setattr(plot_module, "_save", keep)
    return drawn


def lines(figure: "Figure", panel: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[panel].lines
    }


def test_writes_pngs(tmp_path: Path) -> None:
    paths = plot([make_run(tmp_path / "a"), make_run(tmp_path / "b", sandwich=False)], tmp_path / "plots")
    names = ["loss.png", "gradient_norm.png", "learning_rate.png", "activations.png", "norm_gains.png"]
    assert paths == [tmp_path / "plots" / name for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(names)


def test_loss_of_one_run(tmp_path: Path, figures: "dict[str, Figure]") -> None:
    plot([make_run(tmp_path / "a")], tmp_path)
    tokens, loss = lines(figures["loss.png"])["a"]
    assert tokens == [1000 * step for step in range(1, 21)]
    assert loss[0] == 5.0
    assert math.isnan(loss[2])
    assert lines(figures["loss.png"], 1) == {
        "code": ([5000, 10000, 15000, 20000], [4 / 5, 4 / 10, 4 / 15, 4 / 20]),
        "english": ([5000, 10000, 15000, 20000], [6 / 5, 6 / 10, 6 / 15, 6 / 20]),
    }
    assert figures["gradient_norm.png"].axes[0].get_yscale() == "log"


def test_runs_are_overlaid_and_named(tmp_path: Path, figures: "dict[str, Figure]") -> None:
    plot([make_run(tmp_path / "a"), make_run(tmp_path / "b", sandwich=False)], tmp_path)
    assert set(lines(figures["loss.png"])) == {"a", "b"}
    assert set(lines(figures["loss.png"], 1)) == {"a: code", "a: english", "b: code", "b: english"}
    assert set(lines(figures["norm_gains.png"], 0)) == {"a", "b"}
    assert set(lines(figures["norm_gains.png"], 2)) == {"a"}
    assert [text.get_text() for text in figures["norm_gains.png"].legends[0].get_texts()] == ["a", "b"]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path, figures: "dict[str, Figure]") -> None:
    runs = [make_run(tmp_path / "first" / "run"), make_run(tmp_path / "second" / "run")]
    plot(runs, tmp_path)
    assert set(lines(figures["loss.png"])) == {str(run) for run in runs}


def test_depth_shows_moments_of_one_run(tmp_path: Path, figures: "dict[str, Figure]") -> None:
    plot([make_run(tmp_path / "a")], tmp_path)
    curves = lines(figures["activations.png"])
    assert list(curves) == [f"{tokens}K tokens" for tokens in (2, 6, 10, 16, 20)]
    assert curves["20K tokens"] == ([0, 1, 2], [20, 2, 3])


def test_long_runs_get_a_median_that_spikes_do_not_move(tmp_path: Path, figures: "dict[str, Figure]") -> None:
    log = EventLog(tmp_path / "a")
    for step in range(1, 301):
        log.write("step", step, tokens=step, loss=50.0 if step == 150 else 2.0, grad_norm=None, lr=0.0)
    log.close()
    plot([tmp_path / "a"], tmp_path)
    raw, smooth = figures["loss.png"].axes[0].lines
    assert max(raw.get_ydata()) == 50.0
    assert set(smooth.get_ydata()) == {2.0}


def test_run_without_statistics_or_validation(tmp_path: Path, figures: "dict[str, Figure]") -> None:
    plot([make_run(tmp_path / "a", steps=1)], tmp_path)
    assert list(figures) == ["loss.png", "gradient_norm.png", "learning_rate.png"]
    assert len(figures["loss.png"].axes) == 1


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(PanguError, match="nowhere is not a run"):
        plot([make_run(tmp_path / "a"), tmp_path / "nowhere"], tmp_path / "plots")
    EventLog(tmp_path / "empty").close()
    with pytest.raises(PanguError, match=r"empty/events\.jsonl has no steps"):
        plot([tmp_path / "empty"], tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
