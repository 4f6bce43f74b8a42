"""What `pangu plan` prints: the best layouts, one layout in full, and why one loses to another."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from pangu.plan.evaluate import Plan
from pangu.plan.hardware import GIB
from pangu.plan.search import Search
from pangu.plan.time import step_time

DIMENSIONS = ("tp", "cp", "pp", "dp")
_MOST_STAGES_SHOWN = 64


def print_search(console: Console, search: Search) -> None:
    """The plans in a table, their memory per pipeline rank and communication, and the first beside the second."""
    first = search.plans[0]
    console.print(_summary(search.plans))
    console.print(
        "MFU = tokens/s x model FLOPs per token (6 per matmul weight, causal attention, no recomputation) / "
        f"(devices x {first.peak_flops:.4g} FLOP/s, {first.job.precision} peak of {first.cluster.chip.name}). "
        "Bubble: idle share of the passes' time, (p-1)/(p-1+m) for even 1F1B; in brackets idle over ideal time, "
        "(p-1)/m.",
        style="dim",
    )
    console.print(_memory(search.plans))
    console.print(_communication(search.plans))
    looked = f"{search.considered:,} layouts considered, {search.evaluated:,} simulated"
    if search.unseen < first.time.step:
        looked += f"; the best of the others is estimated at {search.unseen:.3g} s or more"
    console.print(looked + ".", style="dim")
    if len(search.plans) > 1:
        print_comparison(console, first, search.plans[1])


def print_plan(console: Console, plan: Plan) -> None:
    """One layout in full: terms of the step, and time and memory of every pipeline rank."""
    console.print(f"[bold]{plan.shape}[/bold] on {plan.shape.world_size:,} x {plan.cluster.chip.name}")
    console.print(
        f"step {plan.time.step:.4g} s, {plan.tokens_per_second:,.0f} tokens/s, "
        f"{plan.tokens_per_second / plan.shape.world_size:,.1f} per device, MFU {plan.mfu:.1%}; "
        f"{plan.job.num_micro_batches} micro-batches of {plan.job.micro_batch_size} x {plan.job.sequence_length} tokens"
    )
    table = Table("where the time goes", _right("seconds"), _right("share"), title_justify="left")
    for name, seconds in terms(plan).items():
        table.add_row(name, f"{seconds:.4f}", f"{seconds / plan.time.step:.1%}")
    console.print(table)
    console.print(_ranks(plan))
    console.print(f"recomputation per pipeline rank: {recomputation(plan)}")


def print_comparison(console: Console, winner: Plan, loser: Plan) -> None:
    """Term by term, what makes `loser` slower."""
    ours, theirs = terms(winner), terms(loser)
    table = Table(
        "seconds of a step",
        _right(str(winner.shape)),
        _right(str(loser.shape)),
        _right("difference"),
        title_justify="left",
    )
    for name, seconds in ours.items():
        table.add_row(name, f"{seconds:.4f}", f"{theirs[name]:.4f}", f"{theirs[name] - seconds:+.4f}")
    total = loser.time.step - winner.time.step
    table.add_row("step", f"{winner.time.step:.4f}", f"{loser.time.step:.4f}", f"{total:+.4f}", style="bold")
    console.print(table)
    worst = max(ours, key=lambda name: theirs[name] - ours[name])
    better = min(ours, key=lambda name: theirs[name] - ours[name])
    text = f"The runner-up loses {total:.3g} s, most of it by {worst} ({theirs[worst] - ours[worst]:+.3g} s)"
    if theirs[better] < ours[better]:
        text += f"; it gains by {better} ({theirs[better] - ours[better]:+.3g} s)"
    console.print(text + ".")


def terms(plan: Plan) -> dict[str, float]:
    """Seconds that add up to the step's.

    Passes count as the mean over pipeline ranks, communication as what is exposed on the rank that communicates most.
    """
    job, time = plan.job, plan.time
    layout, count = job.layout, job.num_micro_batches
    busy = [count * sum(time.stages[stage].total for stage in layout.stages_of(rank)) for rank in range(layout.pp)]
    mean = sum(busy) / layout.pp
    again = 0.0
    if set(job.recompute) != {"none"}:
        plain = step_time(dataclasses.replace(job, recompute=("none",), recompute_layers=()), plan.cluster)
        again = mean - count * sum(stage.total for stage in plain.stages) / layout.pp
    constant = plan.cluster.efficiency.step_ms * 1e-3
    exposed = {name: time.exposed.get(name, 0.0) for name in DIMENSIONS}
    after_passes = time.step - time.pipeline - time.optimizer - constant
    return {
        "computation": mean - again - exposed["tp"] - exposed["cp"] - (exposed["dp"] - after_passes),
        "recomputation": again,
        "tensor-parallel communication": exposed["tp"],
        "context-parallel communication": exposed["cp"],
        "data-parallel communication": exposed["dp"],
        "slower pipeline ranks": max(busy) - mean,
        "waiting in the pipeline": time.pipeline - max(busy),
        "optimizer": time.optimizer,
        "per step, not modelled": constant,
    }


def recomputation(plan: Plan) -> str:
    """Mode and share of layers of every pipeline rank, equal neighbours together."""
    job, texts = plan.job, []
    for rank in range(job.layout.pp):
        mode = job.recompute[rank if len(job.recompute) > 1 else 0]
        limits = job.recompute_layers
        limit = limits[rank if len(limits) > 1 else 0] if limits else None
        texts.append(mode if mode == "none" or limit is None else f"{mode}, first {limit} layers of a stage")
    return texts[0] if len(set(texts)) == 1 else "; ".join(f"{rank}: {text}" for rank, text in enumerate(texts))


def layer_list(layers: Sequence[int]) -> str:
    """[1, 2, 2, 2, 1] as 1 2x3 1."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(layers) + 1):
        if end == len(layers) or layers[end] != layers[start]:
            parts.append(str(layers[start]) if end - start == 1 else f"{layers[start]}x{end - start}")
            start = end
    return " ".join(parts)


def _summary(plans: Sequence[Plan]) -> Table:
    table = Table(
        "",
        Column("layout", overflow="fold"),
        Column("layers of stages", overflow="fold"),
        "recompute",
        _right("step, s"),
        _right("tokens/s"),
        _right("MFU"),
        _right("bubble"),
        _right("GiB"),
        title=f"{len(plans)} best layouts on {plans[0].shape.world_size:,} x {plans[0].cluster.chip.name}",
        title_justify="left",
    )
    for number, plan in enumerate(plans, start=1):
        modes = dict.fromkeys(plan.job.recompute)
        table.add_row(
            str(number),
            str(plan.shape),
            layer_list(plan.job.layout.stage_layers),
            "/".join(modes),
            f"{plan.time.step:.3f}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.mfu:.1%}",
            f"{plan.time.bubble:.1%} ({plan.time.bubble_over_ideal:.1%})",
            f"{plan.largest_memory / GIB:.1f}",
        )
    return table


def _memory(plans: Sequence[Plan]) -> Table:
    limit = plans[0].cluster.chip.memory_gib
    table = Table("", f"GiB per device by pipeline rank, of {limit:g}", title="memory", title_justify="left")
    for number, plan in enumerate(plans, start=1):
        shown = plan.memory[:_MOST_STAGES_SHOWN]
        table.add_row(str(number), " ".join(f"{rank.total / GIB:.1f}" for rank in shown))
    return table


def _communication(plans: Sequence[Plan]) -> Table:
    table = Table("", title="communication, seconds of a step, exposed + hidden", title_justify="left")
    for name in DIMENSIONS:
        table.add_column(name, justify="right")
    for number, plan in enumerate(plans, start=1):
        exposed, hidden = plan.time.exposed, plan.time.hidden
        cells = (f"{exposed.get(name, 0):.3f} + {hidden.get(name, 0):.3f}" for name in DIMENSIONS)
        table.add_row(str(number), *cells)
    return table


def _ranks(plan: Plan) -> Table:
    columns = [each.name for each in dataclasses.fields(plan.memory[0]) if each.name not in ("moments", "static")]
    table = Table("rank", "stages' layers", _right("s per micro-batch"), title="pipeline ranks", title_justify="left")
    for name in (*columns, "GiB in all"):
        table.add_column(name, justify="right")
    layout = plan.job.layout
    for rank, used in enumerate(plan.memory):
        stages = layout.stages_of(rank)
        seconds = sum(plan.time.stages[stage].total for stage in stages)
        table.add_row(
            str(rank),
            layer_list([layout.stage_layers[stage] for stage in stages]),
            f"{seconds:.4f}",
            *(f"{getattr(used, name) / GIB:.1f}" for name in columns),
            f"{used.total / GIB:.1f}",
        )
    return table


def _right(header: str) -> Column:
    return Column(header, justify="right", overflow="fold")
