"""What a user meets at the command line: one clear message, exit code 2, no traceback, nothing half-written."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pangu.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a command that must fail."""
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("pangu: ")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train"],
        ["plot"],
        ["generate"],
        ["export"],
        ["import"],
        ["tokenizer"],
        ["tokenizer", "train"],
        ["data"],
        ["data", "sample"],
        ["data", "build"],
        ["data", "inspect"],
        ["config"],
        ["config", "show"],
    ],
)
def test_every_command_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    assert "usage: pangu" in capsys.readouterr().out


def test_config_show_prints_the_resolved_tree(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "config", "show", "debug", "--train.steps", "7")
    assert code == 0
    assert "\nsteps = 7\n" in out
    assert "# Optimizer steps of the whole run." in out


def test_train_plot_and_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    steps = ("--train.steps", "3")
    assert run(capsys, "train", "debug", "--output", str(folder), *steps)[0] == 0
    code, out, _ = run(capsys, "plot", str(folder), "--output", str(tmp_path / "plots"))
    assert code == 0
    pictures = [Path(line) for line in out.splitlines()]
    assert pictures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert "--resume" in refuse(capsys, "train", "debug", "--output", str(folder), *steps)
    assert run(capsys, "train", "debug", "--output", str(folder), "--resume", *steps)[0] == 0
    assert "tokenizer" in refuse(capsys, "generate", str(folder), "--prompt", "x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "debgu"), ("debgu", "did you mean 'debug'")),
        (("train", "debug", "--train.stepz", "3"), ("train.stepz", "did you mean 'steps'")),
        (("train", "debug", "--train.device", "npu"), ("npu", "install")),
        (("train", "debug", "--data.synthetic", "false"), ("data.domains",)),
        (("generate", "missing", "--prompt", "x"), ("missing", "pangu train")),
        (("export", "missing", "--output", "out"), ("missing", "pangu train")),
        (("plot", "missing"), ("missing",)),
        (("import", "missing", "--output", "out"), ("missing",)),
        (("data", "build", "missing.txt", "--output", "out", "--tokenizer", "t", "--domain", "d"), ("missing.txt",)),
        (("data", "inspect", "missing"), ("missing.idx",)),
        (("tokenizer", "train", "--domain", "english", "--vocab-size", "9", "--output", "t"), ("NAME=PATH",)),
        (("tokenizer", "train", "--domain", "a=missing.txt", "--vocab-size", "999", "--output", "t"), ("missing.txt",)),
    ],
)
def test_mistakes_have_one_message(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    err = refuse(capsys, *arguments)
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir()), "something was written"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "--debug", "train", "debgu")
    assert code == 2
    assert "Traceback" in err


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Some of the standard library's sources."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for source in sorted(Path(argparse.__file__).parent.glob("[a-d]*.py")):
        shutil.copy(source, folder)
    return folder


def test_from_text_to_an_exported_model(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, data, trained = (str(tmp_path / name) for name in ("tokenizer/tokenizer.model", "data", "run"))
    training = ("tokenizer", "train", "--domain", f"code={corpus}", "--vocab-size", "512")
    assert run(capsys, *training, "--output", str(tmp_path / "tokenizer"))[0] == 0
    build = ("data", "build", str(corpus), "--output", data, "--tokenizer", tokenizer, "--domain", "code")
    code, out, _ = run(capsys, *build, "--workers", "1", "--validation-fraction", "0.1", "--shuffle-seed", "1")
    assert code == 0
    assert "validation: " in out
    code, out, _ = run(capsys, "data", "inspect", data, "--tokenizer", tokenizer)
    assert code == 0
    assert "code" in out

    config = ("train", "debug", "--output", trained, "--data.synthetic", "false", "--data.tokenizer", tokenizer)
    paths = (
        "--data.domains.code.paths",
        f'["{data}"]',
        "--data.domains.code.validation_paths",
        f'["{data}.validation"]',
    )
    assert run(capsys, *config, *paths, "--train.validation_interval", "5")[0] == 0
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    shutil.rmtree(corpus)
    (tmp_path / "tokenizer" / "tokenizer.model").unlink()

    generation = ("generate", trained, "--prompt", "def ", "--prompt", "import os", "--max-new-tokens", "8")
    code, out, _ = run(capsys, *generation)
    assert code == 0
    assert out.startswith("def ")
    assert "\n\nimport os" in out
    assert run(capsys, *generation)[1] == out
    assert run(capsys, *generation, "--temperature", "1.5", "--seed", "3")[1] != out

    exported = tmp_path / "exported"
    assert run(capsys, "export", trained, "--output", str(exported))[0] == 0
    vocabulary = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    ids = vocabulary("def ", return_tensors="pt", return_token_type_ids=False)
    theirs = vocabulary.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    assert theirs.startswith(out.split("\n\nimport os")[0].rstrip("\n"))


def test_a_dataset_of_another_tokenizer_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        domains = ["--domain", f"english={corpus}"]
        size = {"first": "500", "second": "512"}[name]
        assert (
            run(capsys, "tokenizer", "train", *domains, "--vocab-size", size, "--output", str(tmp_path / name))[0] == 0
        )
    first, second = (str(tmp_path / name / "tokenizer.model") for name in ("first", "second"))
    data = str(tmp_path / "data")
    build = ("data", "build", str(corpus), "--output", data, "--tokenizer", first, "--domain", "english")
    assert run(capsys, *build)[0] == 0
    err = refuse(
        capsys,
        *("train", "debug", "--output", str(tmp_path / "run"), "--data.synthetic", "false"),
        *("--data.domains.english.paths", f'["{data}"]', "--data.tokenizer", second),
    )
    assert "tokenizer" in err
    assert not (tmp_path / "run").exists()


def test_python_dash_m_pangu() -> None:
    done = subprocess.run([sys.executable, "-m", "pangu", "train", "debgu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean 'debug'" in done.stderr
