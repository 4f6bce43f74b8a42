"""Variables of torch_npu and HCCL: defaults that leave the user's alone, and combinations that are refused."""

from pathlib import Path
from typing import Any

import pytest

from pangu import config as configuration
from pangu.cli import main
from pangu.config import Config
from pangu.device.environment import activation_mib, apply, npu_environment
from pangu.errors import DeviceError


def config(**overrides: Any) -> Config:
    words = [word for name, value in overrides.items() for word in ("--" + name.replace("__", "."), str(value))]
    return configuration.load("debug", words)


def large(**overrides: Any) -> Config:
    """8 GiB of activations per layer boundary, were it not for cp: 2 x 131072 x 16384 x 2 bytes."""
    sizes = {"model__hidden_size": 16384, "phases__0__sequence_length": 131072, "train__dtype": "bf16"}
    return config(**sizes | {"parallel__tp": 8} | overrides)


def settings(environ: dict[str, str], **overrides: Any) -> dict[str, str]:
    found = npu_environment(config(**overrides), environ)
    assert not found.errors
    return {setting.name: setting.value for setting in found.settings}


def error(environ: dict[str, str], chosen: Config | None = None) -> str:
    with pytest.raises(DeviceError) as caught:
        apply(chosen or config(), environ)
    return str(caught.value)


def test_defaults_of_a_run_on_one_device() -> None:
    assert settings({}) == {
        "TASK_QUEUE_ENABLE": "2",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "HCCL_CONNECT_TIMEOUT": "1800",
        "HCCL_EXEC_TIMEOUT": "1800",
        "HCCL_EVENT_TIMEOUT": "1832",
        "HCCL_DETERMINISTIC": "true",
        "CLOSE_MATMUL_K_SHIFT": "1",
    }
    assert all(setting.reason for setting in npu_environment(config(), {}).settings)


def test_what_the_user_has_set_stays() -> None:
    environ = {"TASK_QUEUE_ENABLE": "0", "HCCL_EXEC_TIMEOUT": "3600", "HCCL_DETERMINISTIC": "strict", "PATH": "/bin"}
    new = apply(config(), environ)
    assert environ["TASK_QUEUE_ENABLE"] == "0"
    assert environ["HCCL_DETERMINISTIC"] == "strict"
    assert environ["HCCL_EVENT_TIMEOUT"] == "3632", "it must exceed the user's own"
    assert new == {name: environ[name] for name in new}
    assert not {"TASK_QUEUE_ENABLE", "HCCL_EXEC_TIMEOUT", "HCCL_DETERMINISTIC"} & set(new)
    assert apply(config(), environ) == {}


def test_what_is_to_be_left_is_left() -> None:
    environ: dict[str, str] = {}
    apply(config(), environ, leave=("TASK_QUEUE_ENABLE",))
    assert "TASK_QUEUE_ENABLE" not in environ
    assert "HCCL_EXEC_TIMEOUT" in environ


def test_the_users_allocator_variable_is_not_joined_by_ours() -> None:
    assert "PYTORCH_NPU_ALLOC_CONF" not in settings({"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_blocking_launches_have_no_queue() -> None:
    assert "TASK_QUEUE_ENABLE" not in settings({"ASCEND_LAUNCH_BLOCKING": "1"})


def test_nondeterministic_runs_set_no_determinism() -> None:
    assert "HCCL_DETERMINISTIC" not in settings({}, train__deterministic="false")


def test_an_endless_execution_has_endless_events() -> None:
    assert settings({"HCCL_EXEC_TIMEOUT": "0"})["HCCL_EVENT_TIMEOUT"] == "0"


def test_timeouts_follow_the_config() -> None:
    found = settings({}, parallel__timeout_seconds=59.5)
    assert (found["HCCL_EXEC_TIMEOUT"], found["HCCL_EVENT_TIMEOUT"]) == ("60", "92")
    assert found["HCCL_CONNECT_TIMEOUT"] == "120", "the least that HCCL takes"


def test_the_buffer_holds_the_largest_activation() -> None:
    assert activation_mib(large()) == 8192
    assert activation_mib(large(parallel__cp=4)) == 2048
    assert activation_mib(large(parallel__tp=1)) == 0, "ranks of data parallelism send no activations"
    assert activation_mib(config(parallel__tp=2)) == 1, "64 KiB, rounded up"
    found = {setting.name: setting.value for setting in npu_environment(large(), {}).settings}
    assert found["HCCL_BUFFSIZE"] == "8192"
    assert "HCCL_BUFFSIZE" not in settings({}, parallel__tp=2), "HCCL's 200 MiB are enough"


def test_a_buffer_that_is_too_small_is_refused_with_the_number() -> None:
    message = error({"HCCL_BUFFSIZE": "8191"}, large())
    assert "micro_batch_size 2 x sequence_length 131072 / parallel.cp 1 x model.hidden_size 16384 x 2 bytes" in message
    assert "= 8192 MiB; set it to 8192" in message
    assert npu_environment(large(), {"HCCL_BUFFSIZE": "8192"}).errors == ()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PYTORCH_NPU_ALLOC_CONF": "a:1", "PYTORCH_ALLOC_CONF": "b:2"}, "a:1 and PYTORCH_ALLOC_CONF=b:2 are both set"),
        (
            {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:64"},
            "max_split_size_mb has no meaning with expandable_segments",
        ),
        ({"TASK_QUEUE_ENABLE": "3"}, "TASK_QUEUE_ENABLE=3: choose one of 0, 1, 2"),
        ({"MULTI_STREAM_MEMORY_REUSE": "yes"}, "MULTI_STREAM_MEMORY_REUSE=yes: choose one of 0, 1, 2, 3"),
        ({"HCCL_CONNECT_TIMEOUT": "60"}, "HCCL_CONNECT_TIMEOUT=60: give whole seconds from 120 to 7200"),
        ({"HCCL_EXEC_TIMEOUT": "-1"}, "HCCL_EXEC_TIMEOUT=-1: give whole seconds"),
        (
            {"HCCL_EXEC_TIMEOUT": "3600", "HCCL_EVENT_TIMEOUT": "3600"},
            "HCCL_EVENT_TIMEOUT=3600 must exceed HCCL_EXEC_TIMEOUT=3600: set it to 3632 or 0",
        ),
        ({"HCCL_EXEC_TIMEOUT": "0", "HCCL_EVENT_TIMEOUT": "9000"}, "set it to 0"),
        ({"HCCL_BUFFSIZE": "200M"}, "HCCL_BUFFSIZE=200M: give a whole number of MiB"),
        ({"HCCL_DETERMINISTIC": "False"}, "contradicts train.deterministic = true"),
    ],
)
def test_known_bad_combinations_are_refused_before_anything_is_set(environ: dict[str, str], message: str) -> None:
    before = dict(environ)
    assert message in error(environ)
    assert environ == before


def test_all_errors_are_reported_at_once() -> None:
    message = error({"TASK_QUEUE_ENABLE": "3", "HCCL_BUFFSIZE": "0"})
    assert "TASK_QUEUE_ENABLE" in message
    assert "HCCL_BUFFSIZE" in message


@pytest.mark.parametrize("emulate", [[], ["--emulate"]])
def test_training_applies_it_before_the_device_is_looked_for(
    emulate: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.environ", {"HCCL_CONNECT_TIMEOUT": "1"})
    run = tmp_path / "run"
    assert main(["train", "debug", "--device", "npu", "--output", str(run), *emulate]) == 2
    assert "HCCL_CONNECT_TIMEOUT=1: give whole seconds from 120 to 7200" in capsys.readouterr().err
    assert not run.exists()


def test_training_on_another_device_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "1")
    assert main(["train", "debug", "--device", "cpu", "--output", str(tmp_path / "run"), "--train.steps", "1"]) == 0
