"""What is run, in which order, and how long each may take.

The order is that of use: first what says right or wrong, then the figures that are asked for most.
Cases of one group share a process, and what they have loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    name: str
    group: str
    seconds: int
    """What it takes on an H100, roughly; it isn't begun with less time left."""

    function: str
    """module:function, which takes a Bench and `options`."""

    options: tuple[tuple[str, Any], ...] = ()


def case(name: str, group: str, seconds: int, function: str, **options: Any) -> Case:
    return Case(name, group, seconds, function, tuple(options.items()))


CASES: tuple[Case, ...] = (
    case("device", "right", 10, "benchmarks.gpu.speed:device"),
    case("packed = alone", "right", 25, "benchmarks.gpu.checks:packed_as_alone"),
    case("each attention = alone", "right", 15, "benchmarks.gpu.checks:each_attention"),
    case("checkpointing = none", "right", 10, "benchmarks.gpu.checks:checkpointing_as_none"),
    case("1 x 8 = 8 x 1", "right", 10, "benchmarks.gpu.checks:one_pass_as_eight"),
    case("fused = unfused head", "right", 20, "benchmarks.gpu.checks:fused_as_unfused"),
    case("fused = plain adapters", "right", 10, "benchmarks.gpu.checks:adapters_as_plain"),
    case("resumed = straight", "right", 20, "benchmarks.gpu.checks:resumed_as_straight"),
    case("fused = plain AdamW", "right", 10, "benchmarks.gpu.checks:optimizer_as_plain"),
    case("qlora trains", "right", 20, "benchmarks.gpu.checks:qlora_trains"),
    case(
        "1b memory, 2 rows a pass",
        "right",
        10,
        "benchmarks.gpu.speed:memory_even",
        model="1b",
        rows=2,
    ),
    case("out of memory", "ladder", 75, "benchmarks.gpu.ladder:goes_down_the_ladder"),
    case("8b long: ours", "large", 90, "benchmarks.gpu.speed:ours", model="8b", kind="long"),
    case("8b mixed: ours", "large", 45, "benchmarks.gpu.speed:ours", model="8b", kind="mixed"),
    case(
        "8b mixed: TRL",
        "trl",
        55,
        "benchmarks.gpu.speed:plain",
        model="8b",
        kind="mixed",
        packing=False,
    ),
    case(
        "8b mixed: TRL packed",
        "trl",
        45,
        "benchmarks.gpu.speed:plain",
        model="8b",
        kind="mixed",
        packing=True,
    ),
    case(
        "8b mixed: Unsloth", "unsloth", 80, "benchmarks.gpu.speed:unsloth", model="8b", kind="mixed"
    ),
    case("1b mixed: ours", "small", 35, "benchmarks.gpu.speed:ours", model="1b", kind="mixed"),
    case("1b long: ours", "small", 30, "benchmarks.gpu.speed:ours", model="1b", kind="long"),
    case(
        "1b mixed: TRL",
        "small",
        35,
        "benchmarks.gpu.speed:plain",
        model="1b",
        kind="mixed",
        packing=False,
    ),
    case(
        "1b mixed: without Liger",
        "small",
        35,
        "benchmarks.gpu.speed:ours",
        model="1b",
        kind="mixed",
        without="use_liger",
    ),
    case(
        "1b mixed: plain adapters",
        "small",
        35,
        "benchmarks.gpu.speed:ours",
        model="1b",
        kind="mixed",
        without="fuse_adapters",
    ),
    case("1b mixed: padded", "small", 35, "benchmarks.gpu.speed:padded", model="1b", kind="mixed"),
    case(
        "8b long: TRL",
        "more",
        60,
        "benchmarks.gpu.speed:plain",
        model="8b",
        kind="long",
        packing=False,
    ),
    case("8b mixed: qlora", "more", 60, "benchmarks.gpu.speed:qlora", model="8b", kind="mixed"),
    case("8b memory, 1 row", "more", 30, "benchmarks.gpu.speed:memory_even", model="8b", rows=1),
    case(
        "8b memory, 4 rows, checkpointing",
        "more",
        30,
        "benchmarks.gpu.speed:memory_even",
        model="8b",
        rows=4,
        checkpointing=True,
    ),
    case(
        "8b memory, qlora",
        "more",
        40,
        "benchmarks.gpu.speed:memory_even",
        model="8b",
        rows=2,
        method="qlora",
    ),
    case(
        "1b mixed: Unsloth",
        "unsloth-1b",
        60,
        "benchmarks.gpu.speed:unsloth",
        model="1b",
        kind="mixed",
    ),
)


def select(names: list[str]) -> list[Case]:
    """The cases whose name has one of these words in it; all without any."""
    return [each for each in CASES if not names or any(name in each.name for name in names)]
