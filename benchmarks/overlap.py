"""How much communication the chunked overlap hides, over a link of a set rate.

    sudo python benchmarks/overlap.py [--rate 200] [--ratio 1] [--chunks 4] [--rounds 5] [--output overlap.json]

Two ranks (gloo, fp32, one thread each) in two network namespaces joined by a veth pair, whose ends `tc` limits to
`rate` Mbit/s: needs Linux, root, `ip` and `tc`. Each pass of the two operators is timed in four ways that take turns:
its matmuls alone, its collectives alone, and the operator in mode "reference" and "chunked". Times are milliseconds of
the slower rank, the fastest of the rounds. The matmuls' inner width is chosen so that matmuls / collectives = `ratio`.

    exposed = what an operator takes longer than its matmuls
    hidden  = 1 - exposed of chunked / exposed of reference

Shares are comparable between machines, times are not. With n pieces and a ratio of at least 1, 1 - 1/n is the most that
a pass with one matmul can hide.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from pangu_kernels.overlap import all_gather_matmul, matmul_reduce_scatter
from pangu_kernels.overlap.collectives import start_all_gather, start_reduce_scatter, wait
from torch import Tensor

RANKS = 2
ADDRESSES = ("10.255.0.1/24", "10.255.0.2/24")
INTERFACE = "overlap0"
CONTESTANTS = ("matmuls", "collectives", "reference", "chunked")

Call = Callable[[], object]


@dataclass(frozen=True)
class Size:
    rows: int
    """Of a rank."""
    width: int
    """Of what is communicated."""
    chunks: int


def gather_forward(group: dist.ProcessGroup, size: Size, inner: int) -> dict[str, Call]:
    x, weight = torch.randn(size.rows, size.width), torch.randn(inner, size.width)
    full = torch.randn(RANKS * size.rows, size.width)
    return {
        "matmuls": lambda: full @ weight.t(),
        "collectives": lambda: wait(start_all_gather(x, group)),
        **modes(lambda mode: all_gather_matmul(x, [weight], group, mode=mode, num_chunks=size.chunks)),
    }


def gather_backward(group: dist.ProcessGroup, size: Size, inner: int) -> dict[str, Call]:
    x, weight = randn(size.rows, size.width), randn(inner, size.width)
    full, d_y = torch.randn(RANKS * size.rows, size.width), torch.randn(RANKS * size.rows, inner)
    ys = {m: all_gather_matmul(x, [weight], group, mode=m, num_chunks=size.chunks)[0] for m in CONTESTANTS[2:]}
    return {
        "matmuls": lambda: (d_y @ weight.detach(), d_y.t() @ full),
        "collectives": lambda: (wait(start_all_gather(x.detach(), group)), wait(start_reduce_scatter(full, group))),
        **modes(lambda mode: torch.autograd.grad(ys[mode], (x, weight), d_y, retain_graph=True)),
    }


def scatter_forward(group: dist.ProcessGroup, size: Size, inner: int) -> dict[str, Call]:
    x, weight = torch.randn(RANKS * size.rows, inner), torch.randn(size.width, inner)
    partial = torch.randn(RANKS * size.rows, size.width)
    return {
        "matmuls": lambda: x @ weight.t(),
        "collectives": lambda: wait(start_reduce_scatter(partial, group)),
        **modes(lambda mode: matmul_reduce_scatter(x, weight, group, mode=mode, num_chunks=size.chunks)),
    }


def scatter_backward(group: dist.ProcessGroup, size: Size, inner: int) -> dict[str, Call]:
    x, weight = randn(RANKS * size.rows, inner), randn(size.width, inner)
    d_y, full = torch.randn(size.rows, size.width), torch.randn(RANKS * size.rows, size.width)
    ys = {m: matmul_reduce_scatter(x, weight, group, mode=m, num_chunks=size.chunks) for m in CONTESTANTS[2:]}
    return {
        "matmuls": lambda: (full @ weight.detach(), full.t() @ x.detach()),
        "collectives": lambda: wait(start_all_gather(d_y, group)),
        **modes(lambda mode: torch.autograd.grad(ys[mode], (x, weight), d_y, retain_graph=True)),
    }


PASSES = {
    "all_gather_matmul, forward": gather_forward,
    "all_gather_matmul, backward": gather_backward,
    "matmul_reduce_scatter, forward": scatter_forward,
    "matmul_reduce_scatter, backward": scatter_backward,
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def modes(call: Callable[[str], object]) -> dict[str, Call]:
    return {mode: lambda mode=mode: call(mode) for mode in CONTESTANTS[2:]}  # type: ignore[misc]


def milliseconds(call: Call) -> float:
    """Of the slower rank."""
    dist.barrier()
    start = time.perf_counter()
    call()
    elapsed = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return elapsed.item() * 1e3


def measure(name: str, group: dist.ProcessGroup, size: Size, ratio: float, rounds: int) -> dict[str, float]:
    inner = size.width
    for _ in range(2):  # the second time from close by
        calls = PASSES[name](group, size, inner)
        matmuls, collectives = (min(milliseconds(calls[c]) for _ in range(3)) for c in CONTESTANTS[:2])
        inner = max(32, round(inner * ratio * collectives / matmuls / 32) * 32)
    calls = PASSES[name](group, size, inner)
    times = dict.fromkeys(CONTESTANTS, float("inf"))
    for _ in range(rounds):
        for contestant in CONTESTANTS:
            times[contestant] = min(times[contestant], milliseconds(calls[contestant]))
    return {"inner": inner, **times}


def run_rank(options: argparse.Namespace) -> None:
    """Writes the times, by pass, into the results file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    store = dist.FileStore(f"{options.folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=options.rank, world_size=RANKS)
    group = dist.group.WORLD
    assert group is not None
    size = Size(options.rows, options.width, options.chunks)
    results = {name: measure(name, group, size, options.ratio, options.rounds) for name in PASSES}
    if options.rank == 0:
        Path(options.folder, "results").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def throttled_link(rate: int) -> Iterator[list[str]]:
    """Names of the two namespaces, removed at the end with all that is in them."""
    names = [f"pangu-overlap-{os.getpid()}-{side}" for side in range(RANKS)]

    def run(command: str) -> None:
        subprocess.run(command.split(), check=True)

    try:
        for name in names:
            run(f"ip netns add {name}")
        run(f"ip link add {INTERFACE} netns {names[0]} type veth peer name {INTERFACE} netns {names[1]}")
        for name, address in zip(names, ADDRESSES, strict=True):
            run(f"ip -n {name} addr add {address} dev {INTERFACE}")
            run(f"ip -n {name} link set {INTERFACE} up")
            run(f"tc -n {name} qdisc add dev {INTERFACE} root tbf rate {rate}mbit burst 128kb latency 400ms")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def run_ranks(rate: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder, throttled_link(rate) as names:
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, *sys.argv, "--rank", str(rank), "--folder", folder]
            )
            for rank, name in enumerate(names)
        ]
        try:
            codes = [process.wait() for process in ranks]
            if any(codes):
                sys.exit(f"exit codes of the ranks: {codes}")
        finally:
            for process in ranks:
                process.kill()
        results: dict[str, dict[str, float]] = json.loads(Path(folder, "results").read_text())
        return results


def add_shares(times: dict[str, float]) -> dict[str, float]:
    exposed = {mode: times[mode] - times["matmuls"] for mode in CONTESTANTS[2:]}
    hidden = 1 - exposed["chunked"] / exposed["reference"]
    return {**times, "ratio": times["matmuls"] / times["collectives"], "hidden": hidden}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=200, help="of the link, in Mbit/s")
    parser.add_argument("--ratio", type=float, default=1.0, help="time of matmuls / time of collectives")
    parser.add_argument("--rows", type=int, default=1024, help="of a rank")
    parser.add_argument("--width", type=int, default=1024, help="columns of what is communicated")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return run_rank(options)
    if os.geteuid() != 0:
        sys.exit("network namespaces need root: run it by sudo, or in a container with NET_ADMIN and SYS_ADMIN")
    results = {name: add_shares(times) for name, times in run_ranks(options.rate).items()}
    results["sum"] = add_shares({c: sum(times[c] for times in results.values()) for c in CONTESTANTS})
    print(f"{'milliseconds':<32}" + "".join(f"{column:>13}" for column in (*CONTESTANTS, "ratio", "hidden")))
    for name, row in results.items():
        times = "".join(f"{row[contestant]:>13.1f}" for contestant in CONTESTANTS)
        print(f"{name:<32}{times}{row['ratio']:>13.2f}{row['hidden']:>13.0%}")
    if options.output:
        settings = {key: getattr(options, key) for key in ("rate", "ratio", "rows", "width", "chunks", "rounds")}
        options.output.write_text(json.dumps({"settings": settings, "passes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
