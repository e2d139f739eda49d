"""Adapter to GGUF files: ours and the usual four tools in a row, on random Llamas.

    python -m benchmarks.export [--folder DIR] [--repeats 2] [--types F16,Q8_0,Q4_K_M]
    python -m benchmarks.export --sweep
    python -m benchmarks.export --gate [--shape 1.07] [--repeats 1]
    python -m benchmarks.export --alone [--shape 7] [--types BF16,Q4_K_M]

The plain way is what guides tell: load the base in its own type, PEFT's merge_and_unload,
save_pretrained; llama.cpp's convert_hf_to_gguf.py to F16; then llama_model_quantize with its
defaults for each type, each step a process of its own. Ours is what the export stage does, checks
of the gate left out. Both have the same threads, take turns, and read a base that the kernel has in
its cache. The model has 1.07 billion parameters.

`--gate` compares the whole export, gate and samples included, with the same steps and llama.cpp's
own llama-perplexity after them, for each file over the same held-out rows (compiled on first use,
10 minutes; --perplexity names one that is there). Then it prints what the gate reads of each file:
from the disk where the file stays in memory, and in passes over the weights where it doesn't.

`--alone` runs ours once, gate and samples included, and prints what the trainer predicts beside
what it took: time, memory, disk. It is for models that the plain steps have no room for. The base
isn't read before; the kernel's cache keeps of it what it has room for.

`--sweep` does it with models of several sizes and a vocabulary of 128,256, and prints the peak of
anonymous memory and the ratios of merging and converting.

The models are made on first use and kept in DIR; 15 GB are needed there, and of the shape 7, 40 GB
there and 20 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

from benchmarks.cost import Cost, Peak, measure
from finetune_trainer.contract import Export, Quantization, Training
from finetune_trainer.memory.forecast import (
    ExportWork,
    Machine,
    export_disk,
    export_memory,
    forecast,
)
from finetune_trainer.memory.machine import free_memory
from finetune_trainer.model.converter import SCRIPT, llama_folder
from finetune_trainer.model.shape import Shape
from hack import cache_dir
from hack.llama_cpp import get_tool

SHAPE = "1.07"
SWEEP = ("0.1", "0.3", "1", "2")
LARGE = "7"
STEPS = "benchmarks.export_steps"


def main() -> None:
    """Run it all and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(tempfile.gettempdir()) / "finetune-benchmark-export"
    parser.add_argument("--folder", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--types", default="BF16,Q8_0,Q4_K_M", help="the first is BF16 or F16")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--gate", action="store_true")
    parser.add_argument(
        "--shape", default=SHAPE, help=f"billions of parameters, of {(*SWEEP, LARGE)}"
    )
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--perplexity", type=Path, help="a llama-perplexity that is there")
    chosen = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{len(os.sched_getaffinity(0))} CPUs, threads: {threads}, load {os.getloadavg()[0]:.1f}")
    kinds = chosen.types.split(",")
    if chosen.gate:
        tool = chosen.perplexity or get_tool(cache_dir(), "llama-perplexity")
        compare_whole(model(chosen.folder, chosen.shape), kinds, chosen.repeats, tool)
    elif chosen.alone:
        run_alone(model(chosen.folder, chosen.shape), kinds)
    elif chosen.sweep:
        for shape in SWEEP:
            sweep(model(chosen.folder, shape), kinds)
    else:
        compare(model(chosen.folder, chosen.shape), kinds, chosen.repeats)


def step(name: str, *arguments: str) -> Cost:
    """Run one of the programs in benchmarks.export_steps."""
    return measure([sys.executable, "-m", f"{STEPS}.{name}", *arguments])


def model(folder: Path, shape: str) -> Path:
    """The folder with base and adapter of a shape, which are made where they are not there."""
    place = folder / shape
    if not (place / "adapter" / "tokenizer.json").is_file():  # what is written last
        place.mkdir(parents=True, exist_ok=True)
        step("make", str(place), shape)
    return place


def compare(place: Path, kinds: list[str], repeats: int) -> None:
    """Both ways in turns; medians of the ratios."""
    first: list[tuple[Cost, Cost]] = []
    whole: list[tuple[Cost, Cost]] = []
    for repeat in range(repeats):
        print(f"round {repeat + 1}, load {os.getloadavg()[0]:.1f}")
        plain = plain_first(place, kinds[0])
        first.append((plain, ours(place, kinds[:1])))
        show("merge and convert", *first[-1])
        rest = [quantized(place, kinds[0], kind) for kind in kinds[1:]]
        whole.append((sum(rest, start=plain), ours(place, kinds)))
        show("  ".join(kinds), *whole[-1])
    summary("merge and convert", first)
    summary("  ".join(kinds), whole)
    clean(place)


def compare_whole(place: Path, kinds: list[str], repeats: int, tool: Path) -> None:
    """The whole export with its gate, and the plain steps with llama-perplexity; then the reads."""
    if not (place / "rows.txt").is_file():
        step("rows", str(place))
    rounds: list[tuple[Cost, Cost]] = []
    for repeat in range(repeats):
        print(f"round {repeat + 1}, load {os.getloadavg()[0]:.1f}")
        plain = plain_first(place, kinds[0])
        plain = sum((quantized(place, kinds[0], kind) for kind in kinds[1:]), start=plain)
        plain = sum((perplexity(place, kind, tool) for kind in kinds), start=plain)
        shutil.rmtree(place / "ours", ignore_errors=True)
        warm(place / "base")
        rounds.append((plain, step("gated", str(place), *kinds)))
        show("the whole, with checks", *rounds[-1])
    summary("the whole, with checks", rounds)
    print((place / "ours" / "gate.json").read_text())
    for kind in kinds:
        print_reads(place, place / "plain" / f"model-{kind}.gguf")
    clean(place)


def run_alone(place: Path, kinds: list[str]) -> None:
    """Ours, whole, beside what is predicted of it."""
    if not (place / "rows.txt").is_file():
        step("rows", str(place))
    clean(place)
    export = Export.model_validate({"gguf": kinds})
    shape = cast("Shape", Shape.of_model(place / "base"))  # of a Llama it is known
    need = export_memory(shape, export) or 0
    free = free_memory()
    cpus = len(os.sched_getaffinity(0))
    work = ExportWork(shape.parameters, export, Quantization.BF16, downloads=False)
    seconds = forecast(work, Machine(cpus, free - need))
    disk = export_disk(shape, Training(), export, 0, Quantization.BF16).total
    print(
        f"{shape.parameters / 1e9:.2f} billion parameters, {free / 1e9:.1f} GB of memory are free"
    )
    for part, value in seconds.items():
        print(f"predicted: {part:16} {value:7.0f} s")
    print(
        f"predicted: {sum(seconds.values()):.0f} s, {need / 1e9:.2f} GB of memory beside mapped "
        f"files, {disk / 1e9:.0f} GB of disk",
        flush=True,
    )
    before = shutil.disk_usage(place).used
    with Peak(lambda: shutil.disk_usage(place).used - before, 1.0) as taken:
        cost = step("gated", str(place), *kinds)
    print(
        f"took: {cost.seconds:.0f} s, {cost.cpu_seconds:.0f} CPU-s, "
        f"{cost.anonymous_bytes / 1e9:.2f} GB of anonymous memory, "
        f"{taken.value / 1e9:.0f} GB of disk beside the base, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    print((place / "ours" / "gate.json").read_text())
    clean(place)


def perplexity(place: Path, kind: str, tool: Path) -> Cost:
    """llama-perplexity on the held-out rows, with its defaults but for the threads."""
    file, threads = place / "plain" / f"model-{kind}.gguf", len(os.sched_getaffinity(0))
    command = [str(tool), "-m", str(file), "-f", str(place / "rows.txt")]
    return measure([*command, "-t", str(threads)])


def print_reads(place: Path, file: Path) -> None:
    """What the gate reads of a file, relative to its size."""
    command = [sys.executable, "-m", f"{STEPS}.check", str(place), str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{file.name}: {found['answers']} answer tokens of {found['tokens']}; from the disk "
        f"{found['read'] / found['size']:.2f} times its size, {found['passes']} passes over it",
        flush=True,
    )


def plain_first(place: Path, kind: str) -> Cost:
    """Merge, save and convert."""
    clean(place)
    warm(place / "base")
    merged = step("merge", str(place))
    target = place / "plain" / f"model-{kind}.gguf"
    target.parent.mkdir()
    command = [sys.executable, str(llama_folder() / SCRIPT), str(place / "merged")]
    return merged + measure([*command, "--outtype", kind.lower(), "--outfile", str(target)])


def quantized(place: Path, first: str, kind: str) -> Cost:
    """One more type."""
    files = [str(place / "plain" / f"model-{each}.gguf") for each in (first, kind)]
    return step("quantize", *files, kind)


def ours(place: Path, kinds: list[str]) -> Cost:
    """Everything in one go."""
    shutil.rmtree(place / "ours", ignore_errors=True)
    warm(place / "base")
    return step("ours", str(place), *kinds)


def sweep(place: Path, kinds: list[str]) -> None:
    size = sum(file.stat().st_size for file in (place / "base").glob("*.safetensors"))
    plain = plain_first(place, kinds[0])
    first = ours(place, kinds[:1])
    whole = ours(place, kinds)
    plainly, alone, all_of = (each.anonymous_bytes / 1e9 for each in (plain, first, whole))
    print(
        f"{size / 2e9:5.2f} billion parameters: anonymous memory for {kinds[0]} {plainly:.2f} GB "
        f"plain, {alone:.2f} GB ours; {all_of:.2f} GB ours for {', '.join(kinds)}",
        flush=True,
    )
    summary("merge and convert", [(plain, first)])
    clean(place)


def warm(folder: Path) -> None:
    """Have the kernel read the files."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            while stream.read(16 << 20):
                pass


def clean(place: Path) -> None:
    """Only base and adapter stay."""
    for name in ("merged", "plain", "ours", "assembled"):
        shutil.rmtree(place / name, ignore_errors=True)


FIGURES = {
    "wall": "seconds",
    "CPU": "cpu_seconds",
    "anonymous memory": "anonymous_bytes",
    "bytes written": "written_bytes",
}


def show(what: str, plain: Cost, mine: Cost) -> None:
    """What was measured in one round."""
    for side, cost in (("plain", plain), ("ours", mine)):
        print(
            f"{what:24} {side:6} {cost.seconds:6.1f} s  {cost.cpu_seconds:6.1f} CPU-s  "
            f"{cost.anonymous_bytes / 1e9:5.2f} GB  {cost.written_bytes / 1e9:5.2f} GB written",
            flush=True,
        )


def summary(what: str, rounds: list[tuple[Cost, Cost]]) -> None:
    """Medians of ours / plain over the rounds."""
    ratios = []
    for figure, name in FIGURES.items():
        each = [getattr(mine, name) / getattr(plain, name) for plain, mine in rounds]
        ratios.append(f"{figure} {statistics.median(each):.2f}")
    print(f"{what:24} ours/plain: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
