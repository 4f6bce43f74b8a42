"""The `pangu` command: one subcommand per package, nothing else."""

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pangu import __version__
from pangu.errors import ConfigError, PanguError

if TYPE_CHECKING:
    from pangu.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a `PanguError`, 130 when interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        if rest and options.run not in (_train, _generate, _config_show, _plan, _dryrun, _doctor):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides = rest
        return options.run(options) or 0
    except PanguError as error:
        if options.debug:
            traceback.print_exc()
        else:
            print(f"pangu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pangu", description="Train dense large language models, Ascend first.")
    parser.add_argument("--version", action="version", version=f"pangu {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    _add_launch(commands)
    _add_doctor(commands)
    _add_plan(commands)
    _add_dryrun(commands)
    _add_plot(commands)
    _add_generate(commands)
    _add_export(commands)
    _add_import(commands)
    _add_tokenizer(commands)
    _add_data(commands)
    _add_config(commands)
    return parser


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "train",
        help="pre-train a model",
        description="Train CONFIG into RUN. --section.field value overrides a field of it, --phases.0.field a phase's.",
    )
    command.add_argument("config", metavar="CONFIG", help="a TOML file, or the name of one in configs/")
    command.add_argument("--output", metavar="RUN", type=Path, help="folder of the run (default: runs/CONFIG)")
    command.add_argument("--resume", action="store_true", help="go on from RUN's newest complete checkpoint, if any")
    command.add_argument("--device", help="short for --train.device")
    command.add_argument("--emulate", action="store_true", help="with --device npu: torch_npu on an emulated CANN")
    command.add_argument("--emulate-soc", metavar="SOC", default="Ascend910B2", help="what is emulated (%(default)s)")
    command.add_argument("--emulate-asynchronous", action="store_true", help="streams of the emulator as threads")
    command.add_argument("--check", action="store_true", help="only say whether layout and data fit; needs no devices")
    command.add_argument("--world-size", type=int, metavar="N", help="with --check: ranks of the job")
    command.set_defaults(run=_train)


def _load_config(options: argparse.Namespace) -> "Config":
    from pangu import config as configuration

    device = ["--train.device", options.device] if options.device else []
    return configuration.load(options.config, [*options.overrides, *device])


def _train(options: argparse.Namespace) -> int:
    config = _load_config(options)
    if options.check:
        from pangu.train.check import check

        print("\n".join(check(config, options.world_size)))
        return 0
    if options.emulate:
        if config.train.device != "npu":
            raise ConfigError(f"--emulate is for --device npu, not for {config.train.device!r}")
        from pangu.device import cann_emulator, environment

        environment.apply(config, leave=("TASK_QUEUE_ENABLE",))  # which the emulator sets
        cann_emulator.install(options.emulate_soc, asynchronous=options.emulate_asynchronous)
    from torch.distributed.elastic.multiprocessing.errors import record

    from pangu.plan.reality import predictor
    from pangu.train.trainer import train

    output = options.output or Path("runs") / Path(options.config).stem
    # What a worker dies of is left where `pangu launch` and torchrun look for it.
    run = record(train) if "TORCHELASTIC_ERROR_FILE" in os.environ else train
    return 0 if run(config, output, resume=options.resume, predict=predictor(config)) else 130


def _add_launch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "launch",
        help="run a command as several processes, on one node or many",
        description="Run `pangu COMMAND` in --nproc processes on this node, on every host of a list, or as one node of "
        "several. Example: pangu launch --nproc 8 train quickstart --parallel.tp 2. See docs/launching.md.",
    )
    command.add_argument("--nproc", type=int, help="processes per node (default: the node's devices, 1 on a CPU)")
    command.add_argument("--nodes", metavar="A,B,...", help="hosts to start on over ssh")
    command.add_argument("--hosts", metavar="FILE", type=Path, help="the same from a file: `name [slots=N]` a line")
    command.add_argument("--ssh", default="ssh", help="how to reach a host, with options (default: %(default)s)")
    command.add_argument("--nnodes", type=int, default=1, help="nodes of the job, each started by its own command")
    command.add_argument("--node-rank", type=int, default=0, help="this node's number, from 0")
    command.add_argument("--master-addr", default="127.0.0.1", help="where the others reach node 0")
    command.add_argument("--master-port", type=int, default=0, help="a free port there (default with hosts: 29400)")
    command.add_argument("--max-restarts", type=int, default=0, help="after failures, from the newest checkpoint")
    command.add_argument("--stop-seconds", type=float, default=600, help="time for a checkpoint after SIGTERM")
    command.add_argument("--join-seconds", type=float, default=900, help="time for other nodes to come, or come back")
    command.add_argument("--lost-seconds", type=float, default=20, help="a node silent for so long is lost")
    command.add_argument("--rank-table", metavar="FILE", type=Path, help="write Ascend's rank table there, for HCCL")
    command.add_argument("--stop-with-stdin", action="store_true", help="the end of standard input acts as SIGTERM")
    command.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="such as train CONFIG ...")
    command.set_defaults(run=_launch)


def _launch(options: argparse.Namespace) -> int:
    from pangu import launch

    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or options.overrides:
        raise ConfigError("launch needs a command after its options, as in: pangu launch --nproc 8 train quickstart")
    if options.nodes and options.hosts:
        raise ConfigError("--nodes and --hosts both name hosts; give one of them")
    hosts = launch.read_hosts(options.hosts) if options.hosts else launch.parse_hosts(options.nodes or "")
    nproc = launch.processes_per_host(hosts, options.nproc) if hosts else options.nproc or _device_count(command)
    if command[0] == "train" and not any(word.startswith("--parallel.devices_per_node") for word in command):
        command = [*command, "--parallel.devices_per_node", str(nproc)]
    job = launch.Job(
        command=tuple(command),
        nproc=nproc,
        nnodes=len(hosts) or options.nnodes,
        node_rank=options.node_rank,
        master_addr=hosts[0].name if hosts and options.master_addr == "127.0.0.1" else options.master_addr,
        master_port=options.master_port or (29400 if len(hosts) > 1 else 0),
        max_restarts=options.max_restarts,
        stop_seconds=options.stop_seconds,
        join_seconds=options.join_seconds,
        lost_seconds=options.lost_seconds,
        rank_table=options.rank_table,
    )
    job = dataclasses.replace(job, coordinates=_coordinates(command, job.nproc * job.nnodes))
    if hosts:
        return launch.launch_hosts(hosts, job, options.ssh.split())
    return launch.launch_node(job, stop_with_stdin=options.stop_with_stdin)


def _train_config(command: Sequence[str]) -> "Config | None":
    """The config of a `train` command, None for any other; the command is checked as `pangu` itself would."""
    options, overrides = _parser().parse_known_args(command)
    options.overrides = overrides
    return _load_config(options) if options.run is _train else None


def _device_count(command: Sequence[str]) -> int:
    config = _train_config(command)
    if config is None:
        return 1
    from pangu.device import resolve, select

    if resolve(config.train.device) == "cpu":
        return 1
    import torch

    select(config.train.device)
    return torch.accelerator.device_count()


def _coordinates(command: Sequence[str], world_size: int) -> Callable[[int], str]:
    """What describes a rank by its place in the layout. A layout that does not fit is refused here, on one process."""
    config = _train_config(command)
    if config is None:
        return lambda rank: ""
    from pangu.parallel.layout import make_layout

    layout = make_layout(config, world_size)
    return lambda rank: ", ".join(f"{name} {index}" for name, index in layout.coordinates(rank).items())


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "doctor",
        help="look at this machine: what is there, whether it computes right, how fast it is",
        description="Say what this machine has for runs of CONFIG, and what to mend. Exits with 1 if something fails.",
    )
    command.add_argument("config", metavar="CONFIG", nargs="?", default="debug", help="as for train (default: debug)")
    command.add_argument("--deep", action="store_true", help="also compute: operators, rates, collectives, training")
    command.add_argument("--device", help="short for --train.device")
    command.add_argument("--emulate", action="store_true", help="with --deep --device npu: on an emulated CANN")
    command.add_argument("--nproc", type=int, help="with --deep: processes that exchange (default: the node's devices)")
    command.add_argument("--json", metavar="FILE", type=Path, help="write one report, to send")
    command.add_argument("--cluster-file", metavar="FILE", type=Path, help="with --deep: this machine, for pangu plan")
    command.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from pangu.doctor.command import diagnose

    return diagnose(
        _load_config(options),
        look_deep=options.deep,
        emulate=options.emulate,
        nproc=options.nproc,
        json_file=options.json,
        cluster=options.cluster_file,
    )


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("plan", help="choose a cluster's layout and predict what it costs", add_help=False)
    command.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from pangu.plan.commands import run

    return run(options.overrides)


def _add_dryrun(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("dryrun", help="run one rank of a cluster's job here, without memory", add_help=False)
    command.set_defaults(run=_dryrun)


def _dryrun(options: argparse.Namespace) -> int:
    from pangu.plan.dryrun_command import run

    return run(options.overrides)


def _add_plot(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("plot", help="draw loss, gradient norm and layer statistics of one or several runs")
    command.add_argument("runs", metavar="RUN", nargs="+", type=Path)
    command.add_argument("--output", metavar="FOLDER", type=Path, help="where the PNGs go (default: RUN/plots)")
    command.set_defaults(run=_plot)


def _plot(options: argparse.Namespace) -> None:
    from pangu.train.plot import plot

    for path in plot(options.runs, options.output or options.runs[0] / "plots"):
        print(path)


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "generate",
        help="continue prompts with a trained model",
        description="Under `pangu launch`, --parallel.field value says how the model is dealt over the processes.",
    )
    command.add_argument("run_folder", metavar="RUN", type=Path, help="a run's folder")
    command.add_argument("--prompt", action="append", required=True, help="may be given several times")
    command.add_argument("--max-new-tokens", type=int, default=100)
    command.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    command.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total mass")
    command.add_argument("--seed", type=int, default=0)
    _add_checkpoint_choice(command)
    command.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    from pangu.train.generation import generate_text

    if options.max_new_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise ConfigError("generate needs --max-new-tokens >= 1, --temperature >= 0 and 0 < --top-p <= 1")
    texts = generate_text(
        options.run_folder,
        options.prompt,
        options.max_new_tokens,
        step=options.step,
        device_name=options.device,
        overrides=options.overrides,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    for text in texts or ():
        print(f"{text}\n")


def _add_checkpoint_choice(command: argparse.ArgumentParser) -> None:
    command.add_argument("--step", type=int, help="which checkpoint (default: the newest complete one)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or npu")


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("export", help="write a trained model for transformers or vLLM")
    command.add_argument("run_folder", metavar="RUN", type=Path)
    command.add_argument("--output", metavar="FOLDER", type=Path, required=True)
    command.add_argument(
        "--target",
        default="auto",
        choices=["auto", "llama", "glm4", "hyperclovax", "pangu_embedded"],
        help="layout; auto: llama for pre-norm, glm4 for sandwich norm, hyperclovax where glm4 cannot",
    )
    command.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    command.add_argument("--step", type=int, help="which checkpoint (default: the newest complete one)")
    command.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    from pangu.convert import export
    from pangu.train.run import load_model, longest_sequence, tokenizer_path

    model = load_model(options.run_folder, options.step)
    target = export(
        dict(model.named_parameters()),
        dataclasses.replace(model.config, max_position_embeddings=longest_sequence(options.run_folder)),
        options.output,
        target=options.target,
        dtype=options.dtype,
        tokenizer=tokenizer_path(options.run_folder),
        rope_base=model.rope_base,
    )
    print(f"wrote {options.output} ({target})")


def _add_import(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "import",
        help="make a run at step 0 of a Hugging Face model",
        description="FOLDER's weights become RUN at step 0: `pangu generate RUN` samples from it, and "
        "`pangu train CONFIG --output RUN --resume` trains it further.",
    )
    command.add_argument("folder", metavar="FOLDER", type=Path, help="config.json and *.safetensors")
    command.add_argument("--output", metavar="RUN", type=Path, required=True)
    command.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> None:
    from pangu.train.imported import import_run

    import_run(options.folder, options.output)
    print(f"wrote {options.output}")


def _add_tokenizer(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    group = commands.add_parser("tokenizer", help="train a tokenizer").add_subparsers(metavar="COMMAND", required=True)
    command = group.add_parser("train", help="one vocabulary per domain, merged and de-duplicated")
    command.add_argument(
        "--domain",
        metavar="NAME=PATH[,PATH...]",
        action="append",
        required=True,
        help="text, JSONL (.gz, .zst) or folders of a domain; may be given several times",
    )
    command.add_argument("--vocab-size", type=int, required=True)
    command.add_argument("--output", metavar="FOLDER", type=Path, required=True)
    command.add_argument(
        "--weight", metavar="NAME=SHARE", action="append", default=[], help="a domain's share of pieces"
    )
    command.add_argument("--sample-bytes", type=int, help="text learned from, per domain (default: 256 per piece)")
    command.add_argument("--text-field", default="text", help="JSONL field that holds the text")
    command.set_defaults(run=_tokenizer_train)


def _tokenizer_train(options: argparse.Namespace) -> None:
    from pangu.tokenizer import train

    train(
        _domains(options.domain),
        options.vocab_size,
        options.output,
        weights=_weights(options.weight) or None,
        sample_bytes=options.sample_bytes,
        text_field=options.text_field,
    )


def _domains(arguments: Sequence[str]) -> dict[str, list[str]]:
    domains: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, paths = argument.partition("=")
        if not (name and equals and paths):
            raise ConfigError(f"--domain {argument!r}: expected NAME=PATH, or NAME=PATH,PATH")
        domains.setdefault(name, []).extend(paths.split(","))
    return domains


def _weights(arguments: Sequence[str]) -> dict[str, float]:
    try:
        return {name: float(share) for name, share in (argument.split("=") for argument in arguments)}
    except ValueError:
        raise ConfigError(f"--weight {' '.join(arguments)!r}: expected NAME=NUMBER") from None


def _add_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    group = commands.add_parser("data", help="make and look at datasets").add_subparsers(
        metavar="COMMAND", required=True
    )

    sample = group.add_parser("sample", help="a real multi-domain corpus from what this machine has")
    sample.add_argument("--output", metavar="FOLDER", type=Path, required=True)
    sample.add_argument("--apt", action="store_true", help="also Debian packages: Chinese and mathematics")
    sample.add_argument("--max-bytes-per-domain", type=int, help="keep a fixed choice of documents above this")
    sample.set_defaults(run=_data_sample)

    build = group.add_parser("build", help="tokenize text or JSONL into Megatron's .bin and .idx")
    build.add_argument("inputs", metavar="INPUT", nargs="+", help="files or folders")
    build.add_argument("--output", metavar="PREFIX", required=True, help="PREFIX.bin, PREFIX.idx and PREFIX.json")
    build.add_argument("--tokenizer", metavar="MODEL", required=True)
    build.add_argument("--domain", required=True)
    build.add_argument("--workers", type=int, help="processes (default: one per core)")
    build.add_argument("--shuffle-seed", type=int, help="shuffle the documents")
    build.add_argument("--sort-by", metavar="FIELD", help="order the documents by a numeric JSONL field, rising")
    build.add_argument(
        "--validation-fraction", type=float, default=0.0, help="share of documents for PREFIX.validation"
    )
    build.add_argument("--text-field", default="text", help="JSONL field that holds the text")
    build.add_argument("--split-lines", action="store_true", help="every line of a text file is a document")
    build.set_defaults(run=_data_build)

    look = group.add_parser("inspect", help="what a tokenized dataset holds")
    look.add_argument("prefix", metavar="PREFIX")
    look.add_argument("--tokenizer", metavar="MODEL")
    look.add_argument("--document", type=int, help="print this document")
    look.add_argument("--json", action="store_true", help="as JSON")
    look.set_defaults(run=_data_inspect)


def _data_sample(options: argparse.Namespace) -> None:
    from pangu.data.sample import sample

    sizes = sample(options.output, apt=options.apt, max_bytes_per_domain=options.max_bytes_per_domain)
    for domain, size in sizes.items():
        print(f"{domain}: {size.documents:,} documents, {size.bytes / 1e6:.1f} MB")


def _data_build(options: argparse.Namespace) -> None:
    from pangu.data.build import build

    result = build(
        options.inputs,
        options.output,
        tokenizer_path=options.tokenizer,
        domain=options.domain,
        workers=options.workers,
        shuffle_seed=options.shuffle_seed,
        sort_by=options.sort_by,
        validation_fraction=options.validation_fraction,
        text_field=options.text_field,
        split_lines=options.split_lines,
    )
    for part, metadata in (("training", result.dataset), ("validation", result.validation)):
        if metadata is not None:
            print(f"{part}: {metadata.documents:,} documents, {metadata.tokens:,} tokens")
    if result.skipped:
        print(f"skipped: {result.skipped:,} documents without text")


def _data_inspect(options: argparse.Namespace) -> None:
    from pangu.data.inspect import inspect

    inspect(options.prefix, tokenizer_path=options.tokenizer, document=options.document, as_json=options.json)


def _add_config(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    group = commands.add_parser("config", help="look at configurations").add_subparsers(
        metavar="COMMAND", required=True
    )
    command = group.add_parser("show", help="the resolved configuration, every field explained")
    command.add_argument("config", metavar="CONFIG")
    command.set_defaults(run=_config_show)


def _config_show(options: argparse.Namespace) -> None:
    from pangu import config as configuration

    print(configuration.show(configuration.load(options.config, options.overrides)), end="")
