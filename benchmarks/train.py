"""Ours and the plain TRL script, on the same rows and seed.

    python -m benchmarks.train [--rows 32] [--rounds 3] [--data variable,fixed] [--float32]

The plain script is what a guide would have you write: SFTTrainer and a LoraConfig with r 16 on
q, k, v and o, batches of 2 with 4 accumulation steps, learning rate 2e-4 with 3% warmup, linear,
prompt and completion columns, rows padded, no packing. It loads the model by name, which TRL does
in float32, and computes in bfloat16 (TRL's default); gradient checkpointing, TRL's default too, is
switched off, which is faster. Its loss is the model's own: TRL's fused one is a Triton kernel,
which needs a GPU. Ours is the recipe, with the split into passes that `prepare` would choose.

With --float32 both compute in float32 all through, as processors without bfloat16 do.

Each training is a process of its own, with the same environment variables. A round is one of each,
one right after the other, so that what slows the machine for minutes slows both; which comes first
changes from round to round. The figure is the median of the rounds' ratios, beside the least and
the greatest. Tokens are those of the rows, without padding, and times those of the training alone.
CPU seconds (user and system) say more than the clock on a machine that is shared. Both adapters are
judged alike, in the first round: in float32, by the mean loss over all answer tokens of rows that
neither was trained on. The seed makes those of the other rounds the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.runtime.lifecycle import set_up_libraries

SIDES, JUDGE = ("plain", "ours"), "judge"


@dataclass(frozen=True)
class Measured:
    tokens: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    @property
    def rate(self) -> float:
        """Tokens for each second of the clock."""
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Tokens for each second of a CPU."""
        return self.tokens / self.cpu_seconds


Round = dict[str, Measured]
"""What each side took."""


def main() -> None:
    """Run it all and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32, help="rows to train on, one epoch")
    parser.add_argument("--held-out", type=int, default=8, help="rows to evaluate on")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each side")
    parser.add_argument("--data", default="variable,fixed")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 on either side")
    parser.add_argument(
        "--batch-size", type=int, help="rows in a pass of ours; left out, the planner chooses"
    )
    chosen = parser.parse_args()
    # Before the libraries are loaded, by the processes that inherit the environment.
    set_up_libraries()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    numbers = "float32" if chosen.float32 else "bfloat16 where the processor has it"
    print(f"{len(os.sched_getaffinity(0))} CPUs, threads: {threads}; {numbers}")
    for kind in chosen.data.split(","):
        with tempfile.TemporaryDirectory() as folder:
            request = {
                "kind": kind,
                "rows": chosen.rows,
                "heldOut": chosen.held_out,
                "batchSize": chosen.batch_size,
                "float32": chosen.float32,
            }
            (Path(folder) / "request.json").write_text(json.dumps(request))
            print(_step("rows", Path(folder)), end="", flush=True)
            _compare(kind, Path(folder), chosen.rounds)


def _compare(kind: str, folder: Path, count: int) -> None:
    """Train in turns, and print each round and what comes out."""
    rounds: list[Round] = []
    losses: dict[str, float] = {}
    for number in range(count):
        found: Round = {}
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            _step(side, folder)
            found[side] = Measured(**_read(folder, side))
            print(f"{kind:9} {side:6} {_line(found[side])}", flush=True)
            if side not in losses:
                _step(JUDGE, folder)
                losses[side] = _read(folder, JUDGE)["eval_loss"]
        rounds.append(found)
    print(f"{kind:9} ours/plain: {summary(rounds, losses)}", flush=True)


def _line(one: Measured) -> str:
    return (
        f"{one.rate:7.1f} tokens/s  {one.cpu_rate:7.1f} tokens/CPU-s  "
        f"peak {one.peak_bytes / 1e9:.2f} GB"
    )


def summary(rounds: list[Round], losses: dict[str, float]) -> str:
    """Medians of the rounds' ratios, ours to plain, with their range."""

    def ratio(name: str) -> str:
        found = sorted(
            getattr(each["ours"], name) / getattr(each["plain"], name) for each in rounds
        )
        return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"

    return (
        f"{ratio('rate')} tokens/s, {ratio('cpu_rate')} tokens/CPU-s, "
        f"{ratio('peak_bytes')} peak memory, {losses['ours'] / losses['plain']:.4f} evaluation loss"
    )


def _read(folder: Path, step: str) -> Any:
    return json.loads((folder / f"{step}.json").read_text())


def _step(step: str, folder: Path) -> str:
    """What the step prints."""
    command = [sys.executable, "-m", "benchmarks.train_steps", step, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{step} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
