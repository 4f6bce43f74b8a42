"""A run trained on one device generates the same text in other layouts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pangu.cli import main

LAYOUTS = {
    "tp2, fsdp": ["--parallel.tp", "2"],
    "pp2 x tp2": ["--parallel.pp", "2", "--parallel.tp", "2"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen a little text, with its tokenizer."""
    folder = tmp_path_factory.mktemp("generation")
    corpus = folder / "text.txt"
    corpus.write_text("\n".join(f"The number after {n} is {n + 1}, and before it comes {n - 1}." for n in range(4000)))
    tokenizer = ["--vocab-size", "364", "--output", str(folder / "tokenizer"), "--domain", f"numbers={corpus}"]
    assert main(["tokenizer", "train", *tokenizer]) == 0
    model = str(folder / "tokenizer" / "tokenizer.model")
    data = ["--output", str(folder / "data"), "--domain", "numbers", "--tokenizer", model, "--workers", "1"]
    assert main(["data", "build", str(corpus), *data]) == 0
    overrides = [
        "--model.vocab_size",
        "364",
        "--data.synthetic",
        "false",
        "--data.domains.numbers.paths",
        f'["{folder / "data"}"]',
    ]
    overrides += ["--data.tokenizer", model, "--metrics.tensorboard", "false", "--train.steps", "30"]
    assert main(["train", "debug", "--output", str(folder / "run"), *overrides]) == 0
    return folder / "run"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_say_the_same(layout: str, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(run), "--prompt", "The number", "--prompt", "before", "--max-new-tokens", "12"]
    capfd.readouterr()
    assert main(arguments) == 0
    expected = capfd.readouterr().out
    launch = [sys.executable, "-m", "pangu", "launch", "--nproc", "4", *arguments, *LAYOUTS[layout]]
    done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert expected.strip().startswith("The number")
    assert expected in done.stdout
