"""Ours and the plain TRL script, on the same rows and seed.

    python -m benchmarks.train [--rows 64] [--repeats 2] [--data variable,fixed]

The plain script is what a guide would have you write: SFTTrainer and a LoraConfig with r 16 on
q, k, v and o, batches of 2 with 4 accumulation steps, learning rate 2e-4 with 3% warmup, linear,
prompt and completion columns, rows padded, no packing. It loads the model by name, which TRL does
in float32, and computes in bfloat16 (TRL's default); gradient checkpointing, TRL's default too, is
switched off, which is faster. Its loss is the model's own: TRL's fused one is a Triton kernel,
which needs a GPU. Ours is the recipe, with the split into passes that `prepare` would choose.

Each training is a process of its own, with the same environment variables; both take turns. Tokens
are those of the rows, without padding, and times those of the training alone. CPU seconds (user and
system) say more than the clock on a machine that is shared. Both adapters are judged alike: in
float32, by the mean loss over all answer tokens of rows that neither was trained on.
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

from finetune_trainer.runtime.startup import set_up_libraries

SIDES, JUDGE = ("plain", "ours"), "judge"


@dataclass(frozen=True)
class Measured:
    tokens: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    eval_loss: float

    @property
    def rate(self) -> float:
        """Tokens for each second of the clock."""
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Tokens for each second of a CPU."""
        return self.tokens / self.cpu_seconds


def main() -> None:
    """Run it all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="rows to train on, one epoch")
    parser.add_argument("--held-out", type=int, default=32, help="rows to evaluate on")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--data", default="variable,fixed")
    parser.add_argument(
        "--batch-size", type=int, help="rows in a pass of ours; left out, the planner chooses"
    )
    chosen = parser.parse_args()
    # Before the libraries are loaded, by the processes that inherit the environment.
    set_up_libraries()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{len(os.sched_getaffinity(0))} CPUs, threads: {threads}")
    for kind in chosen.data.split(","):
        with tempfile.TemporaryDirectory() as folder:
            request = {
                "kind": kind,
                "rows": chosen.rows,
                "heldOut": chosen.held_out,
                "batchSize": chosen.batch_size,
            }
            (Path(folder) / "request.json").write_text(json.dumps(request))
            print(_step("rows", Path(folder)), end="", flush=True)
            found: dict[str, list[Measured]] = {side: [] for side in SIDES}
            for repeat in range(chosen.repeats):
                for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
                    found[side].append(_run(side, Path(folder)))
                    print(f"{kind:9} {side:6} {_line(found[side][-1])}", flush=True)
            _summary(kind, found)


def _line(one: Measured) -> str:
    return (
        f"{one.rate:7.1f} tokens/s  {one.cpu_rate:7.1f} tokens/CPU-s  "
        f"evaluation loss {one.eval_loss:.4f}  peak {one.peak_bytes / 1e9:.2f} GB"
    )


def _summary(kind: str, found: dict[str, list[Measured]]) -> None:
    """Ratios of the medians, ours to plain."""

    def ratio(name: str) -> float:
        plain, ours = (
            statistics.median(getattr(one, name) for one in found[side]) for side in SIDES
        )
        return float(ours / plain)

    print(
        f"{kind:9} ours/plain: {ratio('rate'):.2f} tokens/s, {ratio('cpu_rate'):.2f} tokens/CPU-s, "
        f"{ratio('eval_loss'):.4f} evaluation loss, {ratio('peak_bytes'):.2f} peak memory",
        flush=True,
    )


def _run(side: str, folder: Path) -> Measured:
    """Train in a process of its own, then judge the adapter in another."""
    for step in (side, JUDGE):
        _step(step, folder)
    parts = [json.loads((folder / f"{name}.json").read_text()) for name in (side, JUDGE)]
    return Measured(**parts[0], **parts[1])


def _step(step: str, folder: Path) -> str:
    """What the step prints."""
    command = [sys.executable, "-m", "benchmarks.train_steps", step, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{step} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
