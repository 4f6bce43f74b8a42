"""What a step does to one device, operator by operator: memory, floating-point operations, bytes sent.

One dispatch mode sees every operator, forward and backward, over fake tensors, whose values nobody has computed: a
number that the host reads is 1.

Memory is that of storages, from the operator that makes one until nothing refers to it, or until it is resized, which
is how FSDP frees. What a kernel takes for itself while it runs is not seen, with one exception: the chunk of logits of
`linear_cross_entropy`, which is why that operator is run by its reference.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pangu_kernels.linear_cross_entropy import reference as linear_cross_entropy
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from pangu.model import Transformer
from pangu.parallel import context
from pangu.plan import npu
from pangu.plan.counting import collective, flops
from pangu.plan.places import Place, Places

KINDS = (
    "parameters",
    "gathered parameters",
    "gradients",
    "optimizer state",
    "constants",
    "activations",
    "logits and loss",
    "communication",
    "temporary",
)


_NOTHING = ("prim", "profiler")
"""Namespaces of operators that start nothing on a device."""


@dataclass(eq=False, slots=True)
class Storage:
    """Memory that an operator allocated."""

    number: int
    size: int
    born: Place
    module: str
    kind: str | None = None
    """Where it is known; otherwise how long a storage lives says what it is."""
    communicated: bool = False
    received: bool = False
    resized: bool = False
    died: Place | None = None
    reference: "weakref.ref[torch.UntypedStorage] | None" = None

    def kind_or_guess(self) -> str:
        """What outlives a forward pass is kept for backward, what outlives a backward pass is a gradient."""
        if self.kind is not None:
            return self.kind
        if self.resized:
            return "gathered parameters"
        if self.died is self.born:
            return "communication" if self.communicated else "temporary"
        if self.born.kind == "forward" or self.received:
            return "activations"
        return "communication" if self.communicated else "gradients"


@dataclass(frozen=True)
class Peak:
    """The fullest moment: bytes, by kind, and by module and kind."""

    total: int
    moment: str
    by_kind: dict[str, int]
    by_module: dict[str, dict[str, int]]


@dataclass
class Traffic:
    """Collectives of one kind on one dimension of the mesh; `sent` are bytes of this rank."""

    calls: int = 0
    sent: int = 0


@dataclass
class Counts:
    """Of everything since the last `Recorder.restart`."""

    operators: Counter[str] = field(default_factory=Counter)
    flops: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    """By pass (forward, loss, backward, recompute) and operation (matmul, attention)."""
    traffic: defaultdict[tuple[str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    """By dimension of the mesh and collective."""


class Recorder(TorchDispatchMode):
    """To be entered over (that is, after) the fake mode. dimensions: of the mesh, by the name of a process group.

    on_npu: count the tensors that an NPU's operators make, although these are the CPU's.
    """

    def __init__(self, dimensions: dict[str, str], on_npu: bool = False) -> None:
        super().__init__()
        softmax = npu.softmax_cross_entropy_ if on_npu else linear_cross_entropy.softmax_cross_entropy_
        self._linear_cross_entropy = partial(linear_cross_entropy.forward, loss_and_gradient_=softmax)
        self.dimensions = dimensions
        self.counts = Counts()
        self.live = 0
        self.places = Places()
        self._storages: dict[int, Storage] = {}
        self._gone: list[Storage] = []  # since the peak, of which they were part
        self._made = self._made_at_peak = 0
        self._peak = 0
        self._moment = ""
        self._in_loss = self._paused = False

    def restart(self) -> None:
        """Forget counts and peak, not what is in memory."""
        self.counts = Counts()
        self.places.restart()
        self._peak = -1
        self._see_peak()

    @contextmanager
    def watching(self, parts: Iterable[tuple[int, Transformer]]) -> Iterator[None]:
        """Inside, know the modules of `parts`, by their stages, and hide what is no part of a run."""
        with ExitStack() as stack:
            stack.enter_context(self.places.watching(parts))
            stack.enter_context(_wrapped(torch.UntypedStorage, "resize_", self._resize))
            stack.enter_context(_wrapped(ShardingPropagator, "_propagate_tensor_meta_non_cached", self._unseen))
            stack.enter_context(_wrapped(FSDPParam, "init_all_gather_outputs", self._gathered))
            stack.enter_context(_wrapped(context, "_boundaries", _on_host))
            for _, part in parts:
                stack.enter_context(_wrapped(part, "head_loss", self._loss))
            yield

    def mark(self, tensors: Iterable[tuple[str, Tensor]], kind: str) -> None:
        """Say what the storages of `tensors` are, and of which module."""
        for module, tensor in tensors:
            storage = self._storages.get(id(tensor.untyped_storage()))
            if storage is not None:
                storage.kind, storage.module = kind, module

    def peak(self) -> Peak:
        """Of a step that is over: what a storage is depends on how long it lived."""
        by_kind = dict.fromkeys(KINDS, 0)
        by_module: dict[str, dict[str, int]] = {}
        for storage in (*self._storages.values(), *self._gone):
            if storage.number > self._made_at_peak:
                continue
            kind = storage.kind_or_guess()
            by_kind[kind] += storage.size
            row = by_module.setdefault(storage.module, {})
            row[kind] = row.get(kind, 0) + storage.size
        return Peak(self._peak, self._moment, by_kind, by_module)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # its local operators come here
        if self._paused:
            return func(*args, **kwargs)
        self.places.follow_autograd()
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.pangu.linear_cross_entropy.default:
            with self:
                return self._linear_cross_entropy(*args, **kwargs)
        result = func(*args, **kwargs)
        if not func.is_view and func.namespace not in _NOTHING:
            self.counts.operators[func.name()] += 1
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._add(tensor.untyped_storage())
        if func.namespace in ("c10d", "_c10d_functional"):
            self._communicate(func, args, result)
        else:
            operation, count = flops(func, args, kwargs, result)
            if count:
                self.counts.flops["loss" if self._in_loss else self.places.pass_kind, operation] += count
        return result

    def _communicate(self, func: Any, args: Any, result: Any) -> None:
        found = collective(func, args, result)
        if found is None:
            return
        group, name, sent = found
        traffic = self.counts.traffic[self.dimensions.get(group, group), name]
        traffic.calls += 1
        traffic.sent += sent
        for tensor in tree_iter((args, result)):
            if isinstance(tensor, Tensor):
                storage = self._storages.get(id(tensor.untyped_storage()))
                if storage is not None:
                    storage.communicated = True
                    storage.received = storage.received or name == "receive"

    # ---- memory

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._storages or not storage.nbytes():
            return
        self._made += 1
        kind = "logits and loss" if self._in_loss else None
        entry = Storage(self._made, storage.nbytes(), self.places.now, self.places.module, kind)
        entry.reference = weakref.ref(storage, lambda _: self._remove(key))
        self._storages[key] = entry
        self.live += entry.size
        self._see_peak()

    def _see_peak(self) -> None:
        if self.live > self._peak:
            self._peak, self._moment = self.live, str(self.places)
            self._made_at_peak = self._made
            self._gone = []

    def _remove(self, key: int) -> None:
        entry = self._storages.pop(key)
        entry.died, entry.reference = self.places.now, None
        self.live -= entry.size
        if entry.number <= self._made_at_peak:
            self._gone.append(entry)

    def _resize(self, original: Callable[..., Any], storage: torch.UntypedStorage, size: int) -> Any:
        if not self._paused and id(storage) in self._storages:
            self._remove(id(storage))
        result = original(storage, size)
        if not self._paused:
            self._add(storage)
            if size:
                self._storages[id(storage)].resized = True
        return result

    # ---- what is wrapped while a model is watched

    def _unseen(self, original: Callable[..., Any], *args: Any) -> Any:
        """DTensor's propagation of shapes runs operators on whole, unsharded tensors."""
        before, self._paused = self._paused, True
        try:
            return original(*args)
        finally:
            self._paused = before

    def _gathered(self, original: Callable[..., Any], parameter: FSDPParam, *args: Any) -> None:
        original(parameter, *args)
        self.mark(((self.places.module, output) for output in parameter.all_gather_outputs), "gathered parameters")

    def _loss(self, original: Callable[..., Any], *args: Any) -> Any:
        self._in_loss = True
        try:
            return original(*args)
        finally:
            self._in_loss = False


def _on_host(original: Callable[..., Tensor], *args: Any) -> Tensor:
    """Boundaries of documents have values also here: operators' shapes depend on them."""
    with _disable_current_modes():
        return original(*args)


@contextmanager
def _wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Inside, calls of an attribute go to `wrapper`, with what was there as the first argument."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)
