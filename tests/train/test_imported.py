"""A Hugging Face folder becomes a run: it generates, exports, and trains on."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pangu import config as configuration
from pangu.cli import main
from pangu.errors import CheckpointError
from pangu.train.events import read_events
from pangu.train.imported import import_run
from pangu.train.run import load_model, run_config
from pangu.train.trainer import train


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_an_imported_model_trains_on_from_its_weights(llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_run(llama, run)
    theirs = AutoModelForCausalLM.from_pretrained(llama).eval()
    tokens = torch.arange(20)
    expected = torch.nn.functional.cross_entropy(theirs(tokens[None]).logits[0, :-1], tokens[1:]).item()
    ours = load_model(run)
    loss_sum, _ = ours.loss(tokens[:-1], tokens[1:], torch.arange(19), torch.tensor([0, 19], dtype=torch.int32))
    assert loss_sum.item() / 19 == pytest.approx(expected, rel=1e-5)

    config = configuration.load("debug", ["--train.steps", "3", "--metrics.tensorboard", "false"])
    config = dataclasses.replace(config, model=run_config(run).model)
    assert train(config, run, resume=True)
    first = next(event for event in read_events(run) if event["kind"] == "step")
    assert first["step"] == 1
    before = dict(ours.named_parameters())
    change = max((p - before[name]).abs().max().item() for name, p in load_model(run).named_parameters())
    assert 0 < change < 3 * 3e-3 * 1.5


def test_import_and_export_from_the_command_line(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    assert main(["import", str(llama), "--output", str(run)]) == 0
    assert main(["export", str(run), "--output", str(exported)]) == 0
    assert "(llama)" in capsys.readouterr().out
    theirs, again = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (llama, exported))
    tokens = torch.arange(30)[None]
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits)
    assert main(["import", str(llama), "--output", str(run)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_an_imported_run_refuses_the_config_of_another_model(llama: Path, tmp_path: Path) -> None:
    import_run(llama, tmp_path / "run")
    with pytest.raises(CheckpointError, match="another model"):
        train(configuration.load("debug"), tmp_path / "run", resume=True)
