"""What has to be installed, and how to bring it to a machine without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

# What the trainer imports when it trains, by module -> by the name of its wheel.
MODULES = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "trl": "trl",
    "datasets": "datasets",
    "dill": "dill",
    "multiprocess": "multiprocess",
    "xxhash": "xxhash",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
    "pythonjsonlogger": "python-json-logger",
    "jinja2": "jinja2",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface-hub",
}
OPTIONAL = {
    "bitsandbytes": "qlora",
    "triton": "TRL's output layer",
    "unsloth": "Unsloth",
    "liger_kernel": "Liger's kernels, which the fastest figures rest on",
}
"""Without one of these its cases are left out."""

TRAINER = Path(__file__).parents[2] / "trainer"
INSTALLED = "FINETUNE_BENCHMARK_WHEELS"  # set in the program that --wheels starts


def prepare(wheels: Path | None, *, tiny: bool) -> str | None:
    """Install from `wheels` and start over with them; what is missing, in one line."""
    find_trainer()
    if wheels and INSTALLED not in os.environ:
        start_over(wheels)
    missing = [wheel for module, wheel in MODULES.items() if find_spec(module) is None]
    if missing:
        return (
            f"Not installed: {', '.join(missing)}. Get them as wheels (pip download --no-deps "
            f"--dest FOLDER {' '.join(missing)}) and name the folder: --wheels FOLDER"
        )
    if tiny:
        return None
    import torch  # noqa: PLC0415 - it may not be there

    if not torch.cuda.is_available():
        return (
            "No GPU that this torch can use: make gpu needs one NVIDIA GPU (24 GB for the 8B "
            "model's cases), its driver, and torch for CUDA. Every line of it runs on a CPU, "
            "without measuring anything, with: make gpu TINY=1"
        )
    return None


def install(files: list[str], folder: str) -> None:
    """Into a folder; by pip, which sees whether they are for this Python, or where there is none by
    unpacking them."""
    if find_spec("pip") is None:
        for file in files:
            with ZipFile(file) as wheel:
                wheel.extractall(folder)
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run([*pip, "--no-compile", "--target", folder, *files], check=False)
    if done.returncode:
        sys.exit("The wheels can't be installed: are they for this Python and machine?")


def find_trainer() -> None:
    """Let this process and those that it starts import the trainer from this checkout."""
    if find_spec("finetune_trainer") is None:
        sys.path.insert(0, str(TRAINER))
        path = filter(None, [str(TRAINER), os.environ.get("PYTHONPATH")])
        os.environ["PYTHONPATH"] = os.pathsep.join(path)


def start_over(wheels: Path) -> None:
    """Run this program again with the wheels of a folder in a folder of their own.

    What is installed stays as it is, and no index is asked. It never returns.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        sys.exit(f"There is no wheel in {wheels}")
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
        install(files, folder)
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, INSTALLED: folder}
        command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
        sys.exit(subprocess.run(command, check=False, env=environment).returncode)
