"""Tokens a second, MFU and peak memory: ours, the plain script by TRL, and Unsloth.

Each side trains an adapter with r=16 on q, k, v and o at the guide's settings, on the same rows, in
16 bits. Steps are timed after the first three, and tokens counted without padding. The plain script
has what favours it: weights in 16 bits, no gradient checkpointing, TRL's own fused output layer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_flash_attn_2_available
from trl.trainer.sft_trainer import SFTTrainer

from benchmarks.gpu.flops import Work, mfu, model_flops, peak_flops
from benchmarks.gpu.models import AROUND, mixed_lengths, row
from benchmarks.gpu.outcome import Outcome, Verdict
from benchmarks.gpu.trainings import (
    Ask,
    Bench,
    StepClock,
    attention_of,
    fine_tune,
    free_memory,
    make_work,
    missing_for_qlora,
    on_step_end,
    optimizer_of,
    switched,
)
from benchmarks.plain_script import UnfusedTrainer, guide_arguments, guide_lora
from benchmarks.speed_model import DEVICES, H100, ROW, Setup, cost
from finetune_trainer.contract import Lora, TrainingMetrics
from finetune_trainer.memory.gpus import check_gpus, describe_gpus
from finetune_trainer.memory.machine import find_gpus
from finetune_trainer.memory.remedies import MARGIN
from finetune_trainer.model.loading import compute_dtype
from finetune_trainer.model.shape import Shape
from finetune_trainer.runtime import binary
from finetune_trainer.train.link import TrainingWork
from finetune_trainer.train.recipe import sft
from finetune_trainer.train.recipe.lora import LIGER
from finetune_trainer.train.recipe.trainer import RecipeTrainer
from finetune_trainer.train.supervisor.setup import missing_for_unsloth

MOST_STEPS = 40
SOLID = 8192  # side of the matrices that show what the device can do


def device(bench: Bench) -> Outcome:
    """What trains, and how fast it multiplies two large matrices of 16-bit numbers."""
    side, times = (64, 2) if bench.scale.tiny else (SOLID, 10)
    one, other = (torch.randn(side, side, device=bench.device).to(compute_dtype()) for _ in "ab")
    for _ in range(3):
        one @ other
    began = _now()
    for _ in range(times):
        one @ other
    rate = 2 * side**3 * times / (_now() - began)
    figures: dict[str, Any] = {"matmul_flops": rate, "torch": torch.__version__}
    name = "CPU"
    if bench.device == "cuda":
        found = torch.cuda.get_device_properties(0)
        name = found.name
        figures |= {
            "memory_bytes": found.total_memory,
            "capability": [found.major, found.minor],
            "cuda": torch.version.cuda,
        }
    seen = find_gpus(wanted=1)
    if bench.device == "cuda":
        check_gpus(1, seen)  # as a training that was given a GPU begins; else this case fails
    figures |= {"name": name, "peak_flops": peak_flops(name), "trainer_sees": describe_gpus(seen)}
    return Outcome(Verdict.MEASURED, f"{name}: matmul {rate / 1e12:.3g} TFLOP/s", figures)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def lengths_of(bench: Bench, kind: str) -> tuple[int, ...]:
    """`mixed` as instruction data has them, `long` all of the longest; for MOST_STEPS steps."""
    rows, longest = bench.scale.step_rows, bench.scale.longest
    if kind == "long":
        return (longest,) * (rows // 4 * MOST_STEPS)
    return tuple(mixed_lengths(rows * MOST_STEPS, longest))


LEVERS = ("use_liger", "fuse_adapters")
"""Functions of the recipe that make a model faster where they can, and say whether they did."""


@contextmanager
def noting_levers(without: str | None) -> Iterator[dict[str, bool]]:
    """Note what each lever says, while the block runs; one of them is left alone."""
    said = dict.fromkeys(LEVERS, False)

    def noting(name: str) -> Callable[..., bool]:
        lever = vars(sft)[name]

        def call(*given: Any) -> bool:
            said[name] = name != without and bool(lever(*given))
            return said[name]

        return call

    with switched(sft, **{name: noting(name) for name in LEVERS}):
        yield said


def expected_rate(bench: Bench, work: TrainingWork, *, liger: bool) -> float | None:
    """Tokens a second by the model of the cost (docs/performance.md), for rows of its length; None
    on a GPU that it doesn't know."""
    shape = Shape.of_model(work.model.path)
    name = torch.cuda.get_device_name() if bench.device == "cuda" else H100.name
    known = (each for each in DEVICES if each.name.split()[0] in name.split("-")[0].split())
    device = next(known, None)
    if shape is None or device is None:
        return None
    plan = work.plan
    tokens = plan.pass_tokens or plan.batch_size * ROW
    setup = Setup(shape, device, work.config.training, plan, tokens, liger=liger)
    return cost(setup).tokens_per_second


def ours(
    bench: Bench, model: str, kind: str, *, without: str | None = None, **changes: Any
) -> Outcome:
    """The recipe, split into passes as the planner says for this device; `without` one lever."""
    if without == "use_liger" and find_spec(LIGER) is None:
        return Outcome.left_out("Liger isn't installed")
    rows = bench.scale.step_rows // (4 if kind == "long" else 1)
    settings = {"batchSize": rows, "gradientAccumulationSteps": 1, "loggingSteps": 1}
    ask = Ask(model=model, lengths=lengths_of(bench, kind), settings=settings)
    ask = ask.but(**changes)
    work = make_work(bench, ask, "ours")
    clock, seen = StepClock(bench.scale.measured_seconds), list[RecipeTrainer]()
    with noting_levers(without) as levers:
        trained = fine_tune(work, clock.attach, seen.append)
    first, last = clock.counts
    tokens = seen[0].schedule.tokens(last) - seen[0].schedule.tokens(first)
    figures = {
        "plan": work.plan.model_dump(mode="json", exclude_none=True),
        "engine": work.engine,
        "attention": attention_of(seen[0]),
        "packed": type(seen[0].data_collator).__name__ == "PackingCollator",
        "optimizer": optimizer_of(seen[0]),
        "loss": [trained.metrics.train_loss, trained.metrics.final_loss],
        "memory": memory_figures(trained.metrics),
        "levers": levers,
        "predicted_tokens_per_second": expected_rate(bench, work, liger=levers["use_liger"]),
    }
    seen.clear()
    free_memory()
    return _timed(bench, ask, clock, tokens, figures)


def plain(bench: Bench, model: str, kind: str, *, packing: bool) -> Outcome:
    """The script that a guide would have you write; rows padded, or packed by TRL."""
    rows = bench.scale.step_rows // (4 if kind == "long" else 1)
    ask = Ask(model=model, lengths=lengths_of(bench, kind))
    folder = bench.folder / "plain"
    flash = is_flash_attn_2_available()
    loaded = AutoModelForCausalLM.from_pretrained(
        bench.model(model),
        dtype=compute_dtype(),
        device_map={"": bench.device},
        attn_implementation="flash_attention_2" if flash else "sdpa",
    )
    per_pass = min(4, rows)
    arguments = guide_arguments(
        folder,
        max_length=bench.scale.longest,
        per_device_train_batch_size=1 if packing else per_pass,
        gradient_accumulation_steps=rows // per_pass,
        packing=packing,
        use_cpu=bench.device == "cpu",
        bf16=compute_dtype() is torch.bfloat16,
        include_num_input_tokens_seen="non_padding",
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = (SFTTrainer if bench.device == "cuda" else UnfusedTrainer)(
        model=loaded,
        args=arguments,
        train_dataset=Dataset.from_list([dict(row(n, i)) for i, n in enumerate(ask.lengths)]),
        peft_config=guide_lora(),
    )
    clock, counts = StepClock(bench.scale.measured_seconds), list[int]()
    clock.attach(trainer)
    count = on_step_end(lambda state, _: counts.append(int(state.num_input_tokens_seen)))
    trainer.add_callback(count)
    trainer.train()
    first, last = clock.counts
    tokens = counts[last - 1] - counts[first - 1]
    figures = {"attention": loaded.config._attn_implementation, "packed": packing}
    if torch.cuda.is_available():
        figures["memory"] = {"peak_bytes": float(torch.cuda.max_memory_reserved())}
    del trainer, loaded
    free_memory()
    return _timed(bench, ask, clock, tokens, figures)


def _timed(
    bench: Bench, ask: Ask, clock: StepClock, tokens: int, figures: dict[str, Any]
) -> Outcome:
    rate = tokens / clock.elapsed
    work = Work.of(ask.lengths, [n - AROUND + 2 for n in ask.lengths])
    per_token = model_flops(bench.shape(ask.model), Lora(), work) / work.tokens
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    share = mfu(per_token * tokens, clock.elapsed, peak_flops(name))
    first, last = clock.counts
    figures |= {
        "tokens_per_second": rate,
        "mfu": share,
        "flops_per_token": per_token,
        "tokens": tokens,
        "seconds": clock.elapsed,
        "steps": last - first,
        "step_seconds": statistics.median(b - a for a, b in pairwise(clock.times[first - 1 :])),
    }
    words = f"{rate:,.0f} tokens/s"
    expected = figures.get("predicted_tokens_per_second")
    if expected and bench.device == "cuda":
        words += f", {rate / expected:.2f} of what was predicted"
    return Outcome(Verdict.MEASURED, words, figures)


def unsloth(bench: Bench, model: str, kind: str) -> Outcome:
    """Ours on Unsloth's engine, as `training.engine: unsloth` runs it."""
    if missing := missing_for_unsloth():
        return Outcome.left_out(missing)
    if bench.device == "cpu":
        return Outcome.left_out("Unsloth needs a GPU")
    return ours(bench, model, kind, engine="unsloth")


def padded(bench: Bench, model: str, kind: str) -> Outcome:
    """Ours without packing."""
    return ours(bench, model, kind, settings={"packing": False})


def qlora(bench: Bench, model: str, kind: str) -> Outcome:
    """Ours with the weights in 4 bits."""
    if missing := missing_for_qlora():
        return Outcome.left_out(missing)
    return ours(bench, model, kind, settings={"method": "qlora"})


def memory_even(
    bench: Bench, model: str, rows: int, *, checkpointing: bool = False, method: str = "lora"
) -> Outcome:
    """Peak memory of two steps of the longest rows against what the planner expects."""
    if method == "qlora" and (missing := missing_for_qlora()):
        return Outcome.left_out(missing)
    settings = {"batchSize": rows, "gradientAccumulationSteps": 1, "method": method}
    lengths = (bench.scale.longest,) * (2 * rows)
    ask = Ask(model, lengths, settings, split=(rows, 1), checkpointing=checkpointing)
    trained = fine_tune(make_work(bench, ask, "memory"))
    found = memory_figures(trained.metrics)
    expected, peak = found["predicted_bytes"], found["peak_bytes"]
    words = (
        f"predicted {binary(round(expected))}, measured {binary(round(peak))} "
        f"({expected / peak - 1:+.0%})"
    )
    if bench.scale.tiny:  # the peak is that of the whole process, whatever it did before
        return Outcome(Verdict.MEASURED, words, {"memory": found})
    return Outcome.of_check(peak <= expected * MARGIN, words, {"memory": found})


def memory_figures(metrics: TrainingMetrics) -> dict[str, float]:
    """The trainer's own figures; of a GPU with what the driver holds beside torch's allocator.

    That is there as long as the process is, and part of the prediction.
    """
    found = {
        "predicted_bytes": metrics.predicted_memory_bytes or math.nan,
        "peak_bytes": metrics.peak_memory_bytes or math.nan,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["allocated_bytes"] = metrics.peak_allocated_bytes or math.nan
        found["driver_bytes"] = float(total - free - torch.cuda.memory_reserved())
        found["peak_bytes"] += found["driver_bytes"]
    return found
