"""Environment variables of torch_npu and HCCL: what a run sets, why, and which combinations cannot work.

torch_npu and CANN read them once, so `apply` comes before the first import of torch_npu. What the user has set stays.
Sources: torch_npu's "Environment Variable Reference" (docs/en/environment_variable_reference of Ascend/pytorch), the
HCCL user guide of CANN 8.5 ("HCCL" below), and what MindSpeed-LLM's training scripts set.
"""

import math
import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from pangu.config import Config
from pangu.errors import DeviceError

DEFAULT_BUFFER_MIB = 200
"""HCCL_BUFFSIZE where nobody sets it (HCCL)."""
_EVENT_MARGIN_SECONDS = 32  # between the defaults of HCCL_EXEC_TIMEOUT, 1836, and HCCL_EVENT_TIMEOUT, 1868
_CONNECT_SECONDS = (120, 7200)
_CHOICES = {"TASK_QUEUE_ENABLE": ("0", "1", "2"), "MULTI_STREAM_MEMORY_REUSE": ("0", "1", "2", "3")}
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Setting:
    """A variable, the value that Pangu gives it, and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Environment:
    """settings: all that a run wants, the user's own values in place of ours. errors: why it cannot run like this."""

    settings: tuple[Setting, ...]
    errors: tuple[str, ...]


def npu_environment(config: Config, environ: Mapping[str, str]) -> Environment:
    """What a run of `config` on NPUs wants in an environment like `environ`; looks at nothing else."""
    wanted = tuple(_wanted(config, environ))
    settings = tuple(Setting(s.name, environ.get(s.name, s.value), s.reason) for s in wanted)
    merged = {**environ, **{setting.name: setting.value for setting in settings}}
    return Environment(settings, tuple(_errors(config, merged)))


def apply(
    config: Config, environ: MutableMapping[str, str] | None = None, *, leave: tuple[str, ...] = ()
) -> dict[str, str]:
    """Set what `config` wants and the user has not set, except the names in `leave`; returns what was set.

    Raises `DeviceError` with all that cannot work, before anything is set.
    """
    environ = os.environ if environ is None else environ
    found = npu_environment(config, environ)
    if found.errors:
        raise DeviceError("the environment does not fit the run:\n  " + "\n  ".join(found.errors))
    new = {s.name: s.value for s in found.settings if s.name not in environ and s.name not in leave}
    environ.update(new)
    return new


def activation_mib(config: Config) -> int:
    """MiB of the largest activation that ranks send one another, rounded up; 0 where they send none.

    HCCL recommends a communicator's buffer of at least micro-batch x sequence x hidden size x bytes per number, as less
    splits a message into several rounds. A context-parallel rank holds its share of the sequence.
    """
    parallel = config.parallel
    if parallel.tp == parallel.cp == parallel.pp == 1:
        return 0
    sequence = max(phase.sequence_length for phase in config.phases)
    numbers = config.train.micro_batch_size * sequence // parallel.cp * config.model.hidden_size
    return math.ceil(numbers * _BYTES[config.train.dtype] / 2**20)


def _wanted(config: Config, environ: Mapping[str, str]) -> Iterator[Setting]:
    if config.train.hang_seconds:
        yield Setting("TORCH_HCCL_TRACE_BUFFER_SIZE", "2000", "collectives remembered, for train.hang_seconds to show")
    if environ.get("ASCEND_LAUNCH_BLOCKING") != "1":  # with it there is no queue
        yield Setting("TASK_QUEUE_ENABLE", "2", "operators are launched by a second thread; torch_npu advises level 2")
    if "PYTORCH_ALLOC_CONF" not in environ:
        yield Setting(
            "PYTORCH_NPU_ALLOC_CONF",
            "expandable_segments:True",
            "less fragmentation when sizes vary from batch to batch; needs a driver of 23.0.0 or newer",
        )
    seconds = math.ceil(config.parallel.timeout_seconds)
    connect = min(max(seconds, _CONNECT_SECONDS[0]), _CONNECT_SECONDS[1])
    yield Setting(
        "HCCL_CONNECT_TIMEOUT",
        str(connect),
        "parallel.timeout_seconds; HCCL's 120 s are short for ranks that still load",
    )
    yield Setting("HCCL_EXEC_TIMEOUT", str(seconds), "parallel.timeout_seconds")
    execution = _integer(environ.get("HCCL_EXEC_TIMEOUT", str(seconds))) or 0
    yield Setting(
        "HCCL_EVENT_TIMEOUT",
        str(execution + _EVENT_MARGIN_SECONDS) if execution else "0",
        "must exceed HCCL_EXEC_TIMEOUT; 0 is for ever",
    )
    needed = activation_mib(config)
    if needed > DEFAULT_BUFFER_MIB:
        yield Setting("HCCL_BUFFSIZE", str(needed), "MiB of the largest activation sent; twice that per communicator")
    if config.train.deterministic:
        yield Setting("HCCL_DETERMINISTIC", "true", "train.deterministic: sums over ranks in one order")
        yield Setting("CLOSE_MATMUL_K_SHIFT", "1", "train.deterministic: sums inside a matmul in one order")


def _errors(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    yield from _allocator_errors(environ)
    for name, choices in _CHOICES.items():
        if environ.get(name, choices[0]) not in choices:
            yield f"{name}={environ[name]}: choose one of {', '.join(choices)}"
    yield from _timeout_errors(environ)
    yield from _buffer_errors(config, environ)
    if config.train.deterministic and environ.get("HCCL_DETERMINISTIC", "true").lower() == "false":
        yield (
            "HCCL_DETERMINISTIC=false contradicts train.deterministic = true: unset it, or set train.deterministic to "
            "false"
        )


def _allocator_errors(environ: Mapping[str, str]) -> Iterator[str]:
    settings = environ.get("PYTORCH_NPU_ALLOC_CONF")
    if settings is not None and "PYTORCH_ALLOC_CONF" in environ:
        yield (
            f"PYTORCH_NPU_ALLOC_CONF={settings} and PYTORCH_ALLOC_CONF={environ['PYTORCH_ALLOC_CONF']} are both set, "
            "which torch_npu refuses: unset one of them"
        )
    options = dict(part.strip().partition(":")[::2] for part in (settings or "").split(","))
    if options.get("expandable_segments", "").lower() == "true":
        for name in ("max_split_size_mb", "garbage_collection_threshold"):
            if name in options:
                yield (
                    f"PYTORCH_NPU_ALLOC_CONF={settings}: {name} has no meaning with expandable_segments:True; "
                    "leave one of them out"
                )


def _timeout_errors(environ: Mapping[str, str]) -> Iterator[str]:
    values = {}
    low, high = _CONNECT_SECONDS
    for name, smallest, largest in (
        ("HCCL_CONNECT_TIMEOUT", low, high),
        ("HCCL_EXEC_TIMEOUT", 0, 2**31 - 1),
        ("HCCL_EVENT_TIMEOUT", 0, 2**31 - 1),
    ):
        value = values[name] = _integer(environ[name])
        if value is None or not smallest <= value <= largest:
            yield f"{name}={environ[name]}: give whole seconds from {smallest} to {largest}"
    execution, event = values["HCCL_EXEC_TIMEOUT"], values["HCCL_EVENT_TIMEOUT"]
    if execution is None or event is None:
        return
    if event and (event <= execution or execution == 0):
        fix = "0 (for ever, as HCCL_EXEC_TIMEOUT is)" if execution == 0 else f"{execution + _EVENT_MARGIN_SECONDS} or 0"
        yield f"HCCL_EVENT_TIMEOUT={event} must exceed HCCL_EXEC_TIMEOUT={execution}: set it to {fix}"


def _buffer_errors(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    if "HCCL_BUFFSIZE" not in environ:
        return
    value = _integer(environ["HCCL_BUFFSIZE"])
    if value is None or value < 1:
        yield f"HCCL_BUFFSIZE={environ['HCCL_BUFFSIZE']}: give a whole number of MiB, at least 1"
        return
    needed = activation_mib(config)
    if value < needed:
        parallel, sequence = config.parallel, max(phase.sequence_length for phase in config.phases)
        yield (
            f"HCCL_BUFFSIZE={value} is too small: train.micro_batch_size {config.train.micro_batch_size} x "
            f"sequence_length {sequence} / parallel.cp {parallel.cp} x model.hidden_size {config.model.hidden_size} x "
            f"{_BYTES[config.train.dtype]} bytes = {needed} MiB; set it to {needed}, or unset it"
        )


def _integer(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None
