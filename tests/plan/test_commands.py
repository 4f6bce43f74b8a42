"""`pangu plan` from the command line: tables, files, and one clear message for what is wrong."""

import json
from pathlib import Path

import pytest
from plan_helpers import small_config

from pangu import config as configuration
from pangu.cli import main
from pangu.parallel.layout import make_layout


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A config and a cluster file, the latter without a network."""
    config, cluster = tmp_path / "config.toml", tmp_path / "cluster.toml"
    config.write_text(configuration.show(small_config(num_layers=4)))
    described = Path(configuration.NAMED_CONFIGS.parent / "launch" / "clusters" / "atlas_800t_a2.toml").read_text()
    cluster.write_text(described.split("[network]")[0])
    return str(config), str(cluster)


def test_best_layouts_and_files(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, cluster = files
    written, folder = tmp_path / "best.toml", tmp_path / "timeline"
    assert main(["plan", config, "--cluster", cluster, "--write", str(written), "--timeline", str(folder)]) == 0
    shown = capsys.readouterr().out
    for text in ("best layouts on 8 x Ascend910B3", "MFU = tokens/s", "(p-1)/(p-1+m)", "(p-1)/m", "GiB per device"):
        assert text in shown
    assert "The runner-up loses" in shown
    best = configuration.load(written)
    layout = make_layout(best, 8)
    first_row = next(line for line in shown.splitlines() if line.startswith("│ 1 "))
    assert f"tp{layout.tp}," in first_row
    assert f"dp{layout.dp}" in first_row
    assert sorted(path.name for path in folder.iterdir()) == ["pipeline.json", "pipeline.png"]
    assert json.loads((folder / "pipeline.json").read_text())["traceEvents"]


def test_explain(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    config, cluster = files
    assert (
        main(["plan", config, "--cluster", cluster, "--explain", "tp2,pp2,dp2,1f1b", "--phases.0.batch_size", "8"]) == 0
    )
    shown = capsys.readouterr().out
    assert "tp2,pp2,dp2," in shown
    assert "waiting in the pipeline" in shown
    assert shown.count("│ 0    │") == 1, "every pipeline rank has a row"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--explain", "tp3"], "layout 'tp3' cannot run on 8 devices"),
        (["--explain", "tq8"], "'tq8' is not understood"),
        (["--nodes", "2"], "has no [network]"),
        (["--nodes", "0"], "at least 1"),
        (["--phase", "last"], "0 (only)"),
        (["--devices", "7", "--phases.0.batch_size", "3"], "no layout deals 3 sequences over 7 devices"),
        (["--model.num_layers", "400", "--model.hidden_size", "8192"], "does not fit 8 x Ascend910B3"),
        (["--sweep", "chip.cores=1"], "at least two different"),
        (["--scale", "8..4"], "--scale"),
        (["--train.stepz", "3"], "did you mean"),
        (["--calibrate", "nowhere"], "nowhere is not a run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(
    arguments: list[str], named: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config, cluster = files
    assert main(["plan", config, "--cluster", cluster, *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1, "one message, no traceback"


def test_the_smallest_cluster_is_named(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = files
    large = ["--model.num_layers", "96", "--model.hidden_size", "8192", "--model.intermediate_size", "28672"]
    assert main(["plan", config, "--cluster", "atlas_800t_a2", "--nodes", "1", *large]) == 2
    assert "the smallest cluster of this kind it fits on has" in capsys.readouterr().err


def test_cluster_files_are_strict(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    config, cluster = files
    path = Path(cluster)
    path.write_text(path.read_text().replace("memory_gib", "memory_gb"))
    assert main(["plan", config, "--cluster", cluster]) == 2
    assert "memory_gb" in capsys.readouterr().err
    assert main(["plan", config, "--cluster", "atlas"]) == 2
    assert "atlas_800t_a2" in capsys.readouterr().err


def test_needs_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--cluster", "atlas_800t_a2"]) == 2
    assert "needs a CONFIG" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "--help"])
    assert exit_.value.code == 0
    assert "--explain LAYOUT" in capsys.readouterr().out
