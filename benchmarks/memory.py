"""Predicted and measured memory of a training on this machine's CPU.

    python -m benchmarks.memory [--quick]

Each line is a training of a few steps by the command line, as in a pod: prepare, then train, with
the memory of the train command and its worker sampled while it runs (PSS, so that pages which both
map count once). docs/memory.md keeps the figures of the last run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from examples.base_model import smollm2
from finetune_trainer.config import Training
from finetune_trainer.memory.predict import Recipe, predict
from finetune_trainer.memory.shape import Shape
from finetune_trainer.outcome import StageResult

SAMPLE_SECONDS = 0.1
WORDS = "the kettle whistles when the water boils and stops when it is lifted "
ALL_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A training to measure."""

    model: str
    batch: int
    tokens: int
    """Of each row."""

    training: dict[str, Any]
    quick: bool = False


CASES = [
    Case("smollm2-135m", 1, 128, {}, quick=True),
    Case("smollm2-135m", 4, 256, {}),
    Case("smollm2-135m", 8, 256, {}, quick=True),
    Case("smollm2-135m", 2, 1024, {}),
    Case("smollm2-135m", 8, 512, {"gradientCheckpointing": "always"}),
    Case("smollm2-135m", 4, 512, {"lora": {"dropout": 0, "targetModules": ALL_LAYERS}}),
    Case("smollm2-135m", 4, 256, {"method": "qlora"}),
    Case("llama-0.5b", 4, 256, {}),
    Case("llama-1.1b", 1, 512, {}),
]


def model_folder(name: str, folder: Path) -> Path:
    """SmolLM2, or a Llama of that size with random weights and its tokenizer."""
    if name == "smollm2-135m":
        return smollm2()
    import torch  # noqa: PLC0415 - seconds that --help does not need
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    target = folder / name
    if target.exists():
        return target
    wide = name == "llama-1.1b"
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=2048 if wide else 1280,
        intermediate_size=5632 if wide else 3584,
        num_hidden_layers=22 if wide else 24,
        num_attention_heads=32 if wide else 20,
        num_key_value_heads=4 if wide else 5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.nn.Module.to(LlamaForCausalLM(config), torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(target)
    return target


def run_config(case: Case, model: Path, room: Path) -> dict[str, Any]:
    """Two full steps of rows that are cut off at `tokens`, and a short row that ends."""
    table = room / "train.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("instruction", "response"))
        for number in range(2 * case.batch):
            writer.writerow((f"Row {number}?", f"{number} {WORDS * (case.tokens // 12 + 2)}"))
        writer.writerow(("And?", "It stops."))
    return {
        "model": {"source": str(model)},
        "dataset": {"source": str(table), "maxTruncatedRows": "100%", "evalFraction": 0},
        "training": {
            "epochs": 1,
            "batchSize": case.batch,
            "gradientAccumulationSteps": 1,
            "maxSequenceLength": case.tokens,
            **case.training,
        },
        "export": {"merged": False, "gguf": []},
        "output": {"uri": str(room / "out")},
    }


def command(stage: str, config: dict[str, Any], room: Path) -> list[str]:
    """The command line of a stage."""
    file = room / "run.json"
    file.write_text(json.dumps(config))
    (room / "out").mkdir(exist_ok=True)
    program = [sys.executable, "-m", "finetune_trainer", stage, f"--config={file}"]
    return [*program, f"--workspace={room / stage}", f"--termination-log={room / 'end'}"]


def measure(case: Case, model: Path, room: Path) -> int:
    """Bytes of the train command's processes at their peak."""
    config = run_config(case, model, room)
    with (room / "log").open("w") as log:
        subprocess.run(
            command("prepare", config, room), check=True, stdout=log, stderr=subprocess.STDOUT
        )
        result = StageResult.from_message((room / "end").read_text())
        assert result is not None  # noqa: S101 - prepare succeeded
        assert result.resolved is not None  # noqa: S101
        config["resolved"] = result.resolved.model_dump(mode="json")
        process = subprocess.Popen(
            command("train", config, room), stdout=log, stderr=subprocess.STDOUT
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"{case} failed:\n{(room / 'log').read_text()[-3000:]}")
    return peak


def tree_bytes(pid: int) -> int:
    """Proportional set size of a process and all below it."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:
            continue  # it has just ended
        total += next((int(s.split()[1]) for s in rollup.splitlines() if s.startswith("Pss:")), 0)
    return total * 1024


def bfloat16() -> bool:
    """Whether this processor computes in bfloat16."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def predicted(case: Case, model: Path) -> int:
    """Bytes that the planner would expect."""
    shape = Shape.from_config(json.loads((model / "config.json").read_text()))
    assert shape is not None  # noqa: S101 - Llamas
    training = Training.model_validate(case.training)
    checkpointing = training.gradient_checkpointing == "always"
    recipe = Recipe.on_cpu(training, checkpointing=checkpointing, bfloat16=bfloat16())
    return predict(shape, recipe, case.batch * case.tokens).total


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small cases")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    out = sys.stdout
    out.write("| model | batch x tokens | training | predicted | measured | error |\n")
    out.write("| --- | --- | --- | --- | --- | --- |\n")
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        for number, case in enumerate(CASES):
            if options.quick and not case.quick:
                continue
            room = Path(name) / str(number)
            room.mkdir()
            model = model_folder(case.model, Path(name))
            expected, found = predicted(case, model), measure(case, model, room)
            what = json.dumps(case.training) if case.training else "defaults"
            out.write(
                f"| {case.model} | {case.batch} x {case.tokens} | {what} "
                f"| {expected / 2**20:,.0f} MiB | {found / 2**20:,.0f} MiB "
                f"| {expected / found - 1:+.1%} |\n"
            )
            out.flush()


if __name__ == "__main__":
    main()
