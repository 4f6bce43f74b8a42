"""The layouts that must train as one device does, by name: (ranks, overrides of the config)."""

SANDWICH_LFA = ("--model.local_filter", "two_convolutions_norm", "--model.num_key_value_heads", "8")
NO_RESETS = ("--data.reset_at_documents", "false")
TIED = ("--model.tie_embeddings", "true")
BIASES = ("--model.attention_bias", "true", "--model.feed_forward_bias", "true")
ZERO3 = ("--parallel.zero_stage", "3")
BF16 = ("--train.dtype", "bf16")


def dims(**sizes: int) -> tuple[str, ...]:
    return tuple(word for name, size in sizes.items() for word in (f"--parallel.{name}", str(size)))


def schedule(name: str, *layers: int) -> tuple[str, ...]:
    """Two stages per rank, of so many layers."""
    stages = ("--parallel.pipeline_stages_per_rank", "2") if name != "1f1b" else ()
    return ("--parallel.pipeline_schedule", name, *stages, "--parallel.pipeline_layers", str(list(layers)))


def overlap(mode: str) -> tuple[str, ...]:
    return ("--parallel.overlap", mode)


def recompute(mode: str) -> tuple[str, ...]:
    return ("--parallel.recompute.mode", mode)


FOUR = {
    "tp4": dims(tp=4) + overlap("reference"),
    "tp4 without sp": (*dims(tp=4), "--parallel.sequence_parallel", "false"),
    "tp4 chunked": dims(tp=4) + overlap("chunked"),
    "tp4, 2 key heads": (*dims(tp=4), "--model.num_key_value_heads", "2", *BIASES),
    "tp4 without sp, 1 key head": (
        *(*dims(tp=4), "--model.num_key_value_heads", "1", *BIASES),
        *("--parallel.sequence_parallel", "false"),
    ),
    "tp2 x dp2, lfa": dims(tp=2) + SANDWICH_LFA,
    "tp4 without sp, lfa": (*dims(tp=4), *SANDWICH_LFA, "--parallel.sequence_parallel", "false"),
    "tp2 x dp2, tied": dims(tp=2) + TIED,
    "zero 1": ("--parallel.zero_stage", "1"),
    "zero 2": ("--parallel.zero_stage", "2"),
    "zero 3": ZERO3,
    "hybrid": dims(dp_replicate=2) + ZERO3,
    "replicated": dims(dp_replicate=4),
    "pp4 1f1b, uneven": dims(pp=4) + schedule("1f1b", 1, 2, 1, 1),
    "pp2 1f1b, tied": dims(pp=2) + schedule("1f1b", 3, 2) + TIED,
    "pp2 interleaved": dims(pp=2) + schedule("interleaved_1f1b", 1, 2, 1, 1),
    "pp2 interleaved zero bubble": dims(pp=2) + schedule("interleaved_zero_bubble", 2, 1, 1, 1),
    "pp2 zero bubble v": dims(pp=2) + schedule("zero_bubble_v", 1, 1, 1, 2),
    "pp2 zero bubble v, tied": dims(pp=2) + schedule("zero_bubble_v", 1, 1, 1, 2) + TIED,
    "pp2 dualpipe v": dims(pp=2) + schedule("dualpipe_v", 1, 2, 1, 1),
    "pp2 zero bubble v x tp2": dims(pp=2, tp=2) + schedule("zero_bubble_v", 1, 2, 1, 1),
    "pp2 dualpipe v x tp2 without sp": (
        *(*dims(pp=2, tp=2), *schedule("dualpipe_v", 1, 2, 1, 1)),
        *("--parallel.sequence_parallel", "false"),
    ),
    "pp2 x dp2, zero 3": dims(pp=2) + schedule("1f1b", 2, 3) + ZERO3,
    "cp4 ring": dims(cp=4),
    "cp4 ring without resets": dims(cp=4) + NO_RESETS,
    "cp4 all-gather": (*dims(cp=4), "--parallel.context_exchange", "all_gather"),
    "cp4 all-gather without resets": (*dims(cp=4), "--parallel.context_exchange", "all_gather", *NO_RESETS),
    "cp2 x dp2, lfa": dims(cp=2) + SANDWICH_LFA,
    "cp2 x tp2, lfa": dims(cp=2, tp=2) + SANDWICH_LFA,
    "full recompute, tp2 x pp2": dims(tp=2, pp=2) + schedule("1f1b", 3, 2) + recompute("full"),
    "selective recompute, tp2 x cp2": dims(tp=2, cp=2) + recompute("selective"),
}

EIGHT = {
    "tp8": dims(tp=8),
    "tp2 x pp2 x dp2": dims(tp=2, pp=2) + schedule("1f1b", 2, 3),
    "tp2 x pp2 x dp2, interleaved, chunked, zero 3": dims(tp=2, pp=2)
    + schedule("interleaved_1f1b", 1, 2, 1, 1)
    + overlap("chunked")
    + ZERO3,
    "tp2 x cp2 x dp2": dims(tp=2, cp=2),
    "pp2 x cp2 x tp2": dims(pp=2, cp=2, tp=2) + schedule("zero_bubble_v", 2, 1, 1, 1),
    "pp4 x dp2, lfa": dims(pp=4) + schedule("1f1b", 1, 2, 1, 1) + SANDWICH_LFA,
    "hybrid 2 x 2, tp2, tied": dims(dp_replicate=2, tp=2) + TIED + ZERO3,
}
