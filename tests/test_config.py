"""One tree from TOML and the command line; every mistake is named with its field and its fix."""

import dataclasses
from pathlib import Path

import pytest
import tomllib

from pangu import config as configuration
from pangu.errors import ConfigError

NAMES = sorted(path.stem for path in configuration.NAMED_CONFIGS.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_named_config_loads_and_shows_itself(name: str) -> None:
    config = configuration.load(name)
    shown = configuration.show(config)
    assert configuration.from_tree(tomllib.loads(shown), "shown") == config
    assert configuration.from_tree(configuration.to_tree(config), "tree") == config


def test_every_field_is_documented() -> None:
    shown = configuration.show(configuration.load("debug")).splitlines()
    for number, line in enumerate(shown):
        if (" = " in line and not line.startswith("# ")) or line.startswith("["):
            assert shown[number - 1].startswith("# "), line
            assert len(shown[number - 1]) > 10, line


def test_overrides_replace_fields_of_sections_and_phases() -> None:
    config = configuration.load(
        "debug",
        [
            "--train.steps",
            "20",
            "--phases.0.learning_rate=1e-2",
            "--model.norm_placement",
            "pre",
            "--train.dtype",
            "bf16",
        ],
    )
    assert config.train.steps == 20
    assert config.phases[0].learning_rate == 1e-2
    assert config.model.norm_placement == "pre"
    assert config.train.dtype == "bf16"
    assert config.model == dataclasses.replace(configuration.load("debug").model, norm_placement="pre")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.hiden_size", "3"], r"unknown field model\.hiden_size \(did you mean 'hidden_size'\?\)"),
        (["--modle.hidden_size", "3"], r"unknown field modle \(did you mean 'model'\?\)"),
        (["--phases.0.learnin_rate", "3"], r"phases\.0\.learnin_rate \(did you mean 'learning_rate'\?\)"),
        (["--model.hidden_size", "-3"], r"model\.hidden_size = -3: .*greater than 0"),
        (["--model.hidden_size", "many"], r"model\.hidden_size = 'many': .*integer"),
        (["--model.norm_placement", "post"], r"model\.norm_placement = 'post': .*'sandwich'"),
        (["--model.num_attention_heads", "5"], r"hidden_size 64 is not divisible by num_attention_heads 5"),
        (["--model.num_key_value_heads", "3"], r"num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (["--model.head_dim", "15"], r"head_dim 15 is odd"),
        (["--model.local_filter", "two_convolutions"], r"as many key heads as query heads"),
        (["--train.micro_batch_size", "3"], r"batch_size 4 is not a multiple of train\.micro_batch_size 3"),
        (["--data.synthetic", "false"], r"either data\.domains or data\.synthetic"),
        (["--phases.0.weights", "{english = 1.0}"], r"domain 'english', which data\.domains does not have"),
        (["--phases.1.name", "second"], r"phases are numbered from 0"),
        (["--phases.0.weights", "{english = -1.0}"], r"weights must not be negative"),
        (["--data.fill_in_the_middle.rate", "0.5"], r"needs data\.tokenizer"),
        (["train.steps", "3"], r"unexpected argument 'train\.steps'"),
        (["--train.steps"], r"--train\.steps needs a value"),
        (["--train.steps.more", "3"], r"'steps' has no fields"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration.load("debug", overrides)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_missing_file_names_the_nearest_config() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'debug'"):
        configuration.load("debgu")


def test_broken_toml_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml: .*line 2"):
        configuration.load(write(tmp_path, "[model]\nvocab_size = = 3\n"))


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is missing"):
        configuration.load(write(tmp_path, "[model]\nhidden_size = 3\n"))


def test_a_run_must_have_an_end(tmp_path: Path) -> None:
    text = configuration.find("debug").read_text().replace("steps = 10\n", "")
    with pytest.raises(ConfigError, match=r"the run has no end.*train\.steps"):
        configuration.load(write(tmp_path, text))
    text += '\n[[phases]]\nname = "second"\nsequence_length = 64\nbatch_size = 4\nlearning_rate = 1e-3\ntokens = 100\n'
    with pytest.raises(ConfigError, match=r"phase 'debug' has no tokens"):
        configuration.load(write(tmp_path, text))


def test_strings_survive_toml() -> None:
    config = configuration.load("debug")
    name = 'a "quoted" \\ name\twith\nlines\x7f'
    config = dataclasses.replace(config, phases=(dataclasses.replace(config.phases[0], name=name),))
    domain = configuration.DomainConfig(paths=("一/é",))
    data = configuration.DataConfig(domains={"plain-name_1": domain, "a.b c": domain, "中": domain})
    config = dataclasses.replace(config, data=data)
    assert configuration.from_tree(tomllib.loads(configuration.show(config)), "shown") == config
