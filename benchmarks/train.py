"""Ours and the plain TRL script, on the same rows and seed.

    python -m benchmarks.train [--rows 64] [--repeats 2] [--data variable,fixed]

The plain script is what a guide would have you write: SFTTrainer and a LoraConfig with r 16 on
q, k, v and o, batches of 2 with 4 accumulation steps, learning rate 2e-4 with 3% warmup, linear,
prompt and completion columns, rows padded, no packing. It loads the model by name, which TRL does
in float32, and computes in bfloat16 (TRL's default); gradient checkpointing, TRL's default too, is
switched off, which is faster. Its loss is the model's own: TRL's fused one is a Triton kernel,
which needs a GPU. Ours is the recipe, with the split into passes that `prepare` would choose.

Each training is a process of its own; both take turns. Tokens are those of the rows, without
padding, and times those of the training alone. CPU seconds (user and system) say more than the
clock on a machine that is shared. Both adapters are judged alike: in float32, by the mean loss over
all answer tokens of rows that neither was trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import texts
from examples.base_model import smollm2
from finetune_trainer.logs import set_up_libraries

LONGEST, FIXED = 1024, 256  # tokens
SIDES, JUDGE = ("plain", "ours"), "judge"
SETTINGS: dict[str, Any] = {"epochs": 1, "maxSequenceLength": LONGEST}


@dataclass(frozen=True)
class Measured:
    """One training."""

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
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        step, folder = chosen.child
        _child(step, Path(folder), chosen.batch_size)
        return
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{len(os.sched_getaffinity(0))} CPUs, threads: {threads}")
    for kind in chosen.data.split(","):
        with tempfile.TemporaryDirectory() as folder:
            _write_rows(Path(folder), kind, chosen.rows, chosen.held_out)
            found: dict[str, list[Measured]] = {side: [] for side in SIDES}
            for repeat in range(chosen.repeats):
                for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
                    found[side].append(_run(side, Path(folder), chosen.batch_size))
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


def _run(side: str, folder: Path, batch_size: int | None) -> Measured:
    """Train in a process of its own, then judge the adapter in another."""
    command = [sys.executable, "-m", "benchmarks.train"]
    if batch_size:
        command.append(f"--batch-size={batch_size}")
    for step in (side, JUDGE):
        done = subprocess.run(
            [*command, "--child", step, str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{step} failed:\n{done.stdout}{done.stderr}")
    parts = [json.loads((folder / f"{name}.json").read_text()) for name in (side, JUDGE)]
    return Measured(**parts[0], **parts[1])


def _write_rows(folder: Path, kind: str, rows: int, held_out: int) -> None:
    from finetune_trainer.base_model.tokenizer import encode, load_tokenizer  # noqa: PLC0415

    set_up_libraries()
    tokenizer = load_tokenizer(smollm2())

    def count(row: texts.Example) -> int:
        return len(encode(tokenizer, row)[0])

    make = texts.variable if kind == "variable" else texts.fixed
    found = make(rows + held_out, count, LONGEST if kind == "variable" else FIXED)
    lengths = sorted(count(row) for row in found[:rows])
    print(
        f"{kind:9} {rows} rows, {sum(lengths)} tokens, median {lengths[rows // 2]}, "
        f"longest {lengths[-1]}; {held_out} rows held out"
    )
    (folder / "longest").write_text(str(lengths[-1]))
    for name, part in (("examples", found[:rows]), ("eval", found[rows:])):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def _child(step: str, folder: Path, batch_size: int | None) -> None:
    result: dict[str, Any]
    if step == JUDGE:
        result = {"eval_loss": _judge(folder)}
    else:
        result = asdict(_plain(folder) if step == "plain" else _ours(folder, batch_size))
    (folder / f"{step}.json").write_text(json.dumps(result))


@dataclass(frozen=True)
class Training:
    """What the process that trains can tell."""

    tokens: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def _timed(train: Any, tokens: int) -> Training:
    import resource  # noqa: PLC0415
    import time  # noqa: PLC0415

    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    began, began_cpu = time.monotonic(), cpu()
    train()
    seconds, cpu_seconds = time.monotonic() - began, cpu() - began_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Training(tokens, seconds, cpu_seconds, peak)


def _ours(folder: Path, batch_size: int | None) -> Training:
    set_up_libraries()
    from finetune_trainer.base_model import loading  # noqa: PLC0415
    from finetune_trainer.base_model.tokenizer import load_tokenizer  # noqa: PLC0415
    from finetune_trainer.config import Hardware, RunConfig, TrainingPlan  # noqa: PLC0415
    from finetune_trainer.memory.plan import Lengths, plan  # noqa: PLC0415
    from finetune_trainer.memory.shape import Shape  # noqa: PLC0415
    from finetune_trainer.train import sft  # noqa: PLC0415
    from finetune_trainer.train.packing import prepare_packing  # noqa: PLC0415
    from finetune_trainer.train.trainer import Data  # noqa: PLC0415
    from finetune_trainer.train.work import Work  # noqa: PLC0415

    config = RunConfig.model_validate(
        {
            "model": {"source": str(smollm2())},
            "dataset": {"source": "/data/train.csv"},
            "output": {"uri": "/out"},
            "training": SETTINGS,
        }
    )
    room = folder / "ours"
    room.mkdir(exist_ok=True)
    training = config.training
    hardware = Hardware(memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    shape = Shape.from_config(json.loads((smollm2() / "config.json").read_bytes()))
    assert shape is not None, "SmolLM2's widths are in its config.json"  # noqa: S101
    longest = int((folder / "longest").read_text())
    chosen = plan(training, shape, Lengths(longest), hardware)
    if batch_size:
        effective = training.batch_size * training.gradient_accumulation_steps
        chosen = TrainingPlan(
            batch_size=batch_size,
            gradient_accumulation_steps=effective // batch_size,
            gradient_checkpointing=False,
        )
    work = Work(
        config=config,
        plan=chosen,
        max_sequence_length=LONGEST,
        engine="transformers",
        examples=folder / "examples.jsonl",
        held_out=None,
        model=smollm2(),
        room=room,
    )
    loading.use_available_cpus()
    tokenizer = load_tokenizer(work.model)
    examples, _ = sft.read_examples(work, tokenizer)
    model = loading.load_model(work.model, loading.compute_dtype(), "cpu")
    data = Data(examples, None, packed=prepare_packing(model))
    trainer = sft.build_trainer(model, tokenizer, data, work=work, epochs=1)
    measured = _timed(trainer.train, examples.tokens)
    sft.save_adapter(trainer, tokenizer, folder / "adapter", config.model)
    return measured


def _plain(folder: Path) -> Training:
    from datasets import load_dataset  # noqa: PLC0415
    from peft import LoraConfig  # noqa: PLC0415
    from transformers import Trainer  # noqa: PLC0415
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415

    class PlainTrainer(SFTTrainer):
        """With the model's own loss, and so without TRL's kernel."""

        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            return Trainer.compute_loss(self, *arguments, **options)

    file = str(folder / "examples.jsonl")
    trainer = PlainTrainer(
        model=str(smollm2()),
        args=SFTConfig(
            output_dir=str(folder / "plain"),
            num_train_epochs=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            learning_rate=2e-4,
            lr_scheduler_type="linear",
            warmup_steps=0.03,
            max_length=LONGEST,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=file, split="train", cache_dir=str(folder)),
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.05,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    measured = _timed(trainer.train, tokens)
    trainer.save_model(str(folder / "adapter"))
    return measured


def _judge(folder: Path) -> float:
    set_up_libraries()
    import torch  # noqa: PLC0415
    from peft import PeftModel  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    from finetune_trainer.base_model.tokenizer import encode, load_tokenizer  # noqa: PLC0415

    tokenizer = load_tokenizer(smollm2())
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    total, labels = 0.0, 0
    for line in (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        ids, targets = (torch.tensor([part]) for part in encode(tokenizer, json.loads(line)))
        count = int((targets[:, 1:] >= 0).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=targets).loss.item() * count
        labels += count
    return total / labels


if __name__ == "__main__":
    main()
