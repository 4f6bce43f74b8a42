"""A model and clusters small enough that a search takes a second."""

import dataclasses
from typing import Any

from pangu.config import Config, from_tree
from pangu.parallel.layout import Layout
from pangu.plan.hardware import Cluster, load_cluster


def small_config(batch_size: int = 16, **model: Any) -> Config:
    """Eight layers of 1,024, about 170M parameters."""
    sizes = {"vocab_size": 32_000, "hidden_size": 1024, "num_layers": 8, "num_attention_heads": 16}
    tree = {
        "model": {**sizes, "num_key_value_heads": 8, "intermediate_size": 3584, **model},
        "data": {"synthetic": True},
        "phases": [{"name": "only", "sequence_length": 2048, "batch_size": batch_size, "learning_rate": 1e-4}],
        "train": {"steps": 10, "dtype": "bf16"},
    }
    return from_tree(tree, "small")


def cluster_with(name: str = "atlas_800t_a2", gib: float | None = None) -> Cluster:
    """A described cluster, with other device memory."""
    cluster = load_cluster(name)
    return (
        cluster if gib is None else dataclasses.replace(cluster, chip=dataclasses.replace(cluster.chip, memory_gib=gib))
    )


def layout(stages: tuple[int, ...] = (1,), **sizes: int) -> Layout:
    """One stage on one device, but for `sizes`."""
    return Layout(**{"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, **sizes}, stage_layers=stages,
                  v_shaped=False, devices_per_node=8)  # fmt: skip
