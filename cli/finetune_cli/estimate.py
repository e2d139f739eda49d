"""What a training and an export need, by the planner that `prepare` uses: memory and disk; and time
and price by what the last training took, or by a speed that is given. Nothing is measured here."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from finetune_cli.exits import CliError
from finetune_cli.job import Job
from finetune_cli.rows import CHARACTERS_PER_TOKEN, dataset_bytes, read_uri

if TYPE_CHECKING:
    from finetune_operator.api.finetunejob import FineTuneJobSpec
    from finetune_trainer.model.shape import Shape

GIB = 1 << 30
HUB = "https://huggingface.co"
SECONDS = 10


def check_quantity(text: str) -> None:
    """Raise CliError where it is no quantity of Kubernetes."""
    from kubernetes.utils.quantity import parse_quantity

    from finetune_cli.exits import ExitCode

    try:
        parse_quantity(text)
    except ValueError as error:
        said = f"--gpu-memory {text} is no quantity of Kubernetes: write it as 24Gi or 24G."
        raise CliError(ExitCode.USAGE, said) from error


def needs(
    spec: FineTuneJobSpec,
    job: Job | None = None,
    *,
    gpu_memory: str | None = None,
    tokens_per_second: float | None = None,
    price: float | None = None,
    endpoint: str | None = None,
) -> dict[str, str]:
    """Memory, disk, time and price, each in words; what can't be told says why."""
    gpus = _gpus(spec)
    found: dict[str, str] = {}
    try:
        shape = _shape(spec, endpoint)
    except CliError as error:
        why = f"unknown: {error.message}"
        found |= {"memory": why, "disk": why}
    else:
        found["memory"] = _memory(spec, shape, gpus, gpu_memory)
        found["disk"] = _disk(spec, shape)
    seconds, basis = _seconds(spec, job, tokens_per_second, endpoint)
    if seconds is None:
        found["time"] = f"unknown: {basis}"
        return found
    found["time"] = f"about {_duration(seconds)} of training ({basis})"
    if price is not None:
        hours = seconds / 3600 * gpus
        found["price"] = f"about {hours * price:.2f} for {hours:.2f} GPU-hours"
    return found


def _gpus(spec: FineTuneJobSpec) -> int:
    limits = spec.stages.train.resources.limits
    return sum(int(count) for name, count in limits.items() if name.endswith("/gpu"))


def _shape(spec: FineTuneJobSpec, endpoint: str | None) -> Shape:
    """The model's widths, from its config.json wherever it lies; raises CliError."""
    from finetune_cli.exits import ExitCode
    from finetune_trainer.model.shape import Shape

    source = spec.model.source
    if source.startswith(("s3://", "/")):
        storage = (spec.model.storage or spec.storage).model_dump(mode="json", by_alias=True)
        text = read_uri(f"{source.rstrip('/')}/config.json", storage, endpoint)
    elif source.startswith("oci://"):
        said = f"{source} is a container image, which is not read here; prepare reads it."
        raise CliError(ExitCode.FAILED, said)
    else:
        text = _from_hub(source, spec.model.revision or "main")
    try:
        shape = Shape.from_config(json.loads(text))
    except ValueError:
        shape = None
    if shape is None:
        said = f"the planner doesn't know the widths of {source}; prepare finds them out."
        raise CliError(ExitCode.FAILED, said)
    return shape


def _from_hub(source: str, revision: str) -> bytes:
    from urllib.error import URLError
    from urllib.parse import quote
    from urllib.request import Request, urlopen

    from finetune_cli.exits import ExitCode

    where = f"{quote(source)}/resolve/{quote(revision, safe='')}/config.json"
    asked = Request(f"{os.environ.get('HF_ENDPOINT', HUB)}/{where}")  # noqa: S310 - https
    if token := os.environ.get("HF_TOKEN"):
        asked.add_unredirected_header("Authorization", f"Bearer {token}")  # for the Hub alone
    try:
        with urlopen(asked, timeout=SECONDS) as answer:  # noqa: S310 - https
            return bytes(answer.read())
    except (URLError, OSError) as error:
        said = f"{source}'s config.json can't be read here ({error}); HF_TOKEN opens gated models."
        raise CliError(ExitCode.UNREACHABLE, said) from error


def _memory(spec: FineTuneJobSpec, shape: Shape, gpus: int, given: str | None) -> str:
    from kubernetes.utils.quantity import parse_quantity

    from finetune_trainer.contract import Hardware, StageError
    from finetune_trainer.memory.plan import Lengths, plan

    wanted = given or spec.training.gpu_memory
    memory = int(parse_quantity(wanted)) if wanted is not None else None
    limit = spec.stages.train.resources.limits.get("memory")
    hardware = Hardware(
        gpus=gpus,
        gpu_memory_bytes=memory,
        memory_bytes=int(parse_quantity(limit)) if limit is not None else None,
    )
    try:
        made = plan(spec.training, shape, Lengths(spec.training.max_sequence_length), hardware)
    except StageError as error:
        return f"doesn't fit: {error.message}"
    where = f"of each of {gpus} GPUs" if gpus > 1 else "of the GPU" if gpus else "of the pod (CPU)"
    if made.device_bytes is None:
        return "not predicted: name the GPU's with --gpu-memory or training.gpuMemory"
    known = made.memory_bytes
    of = f" of {known / GIB:.0f} GiB" if known else ""
    rows = f"{made.batch_size} rows a pass, {made.gradient_accumulation_steps} passes a step"
    longest = f"rows of {spec.training.max_sequence_length} tokens"
    return f"{made.device_bytes / GIB:.1f} GiB{of} {where}: {rows}, {longest}"


def _disk(spec: FineTuneJobSpec, shape: Shape) -> str:
    from finetune_trainer.memory.forecast import export_disk, training_disk

    model = 2 * shape.parameters  # 16 bits a weight
    train = training_disk(shape, spec.training, model).total
    export = export_disk(shape, spec.training, spec.export, model).total
    return f"{train / GIB:.1f} GiB to train, {export / GIB:.1f} GiB to export"


def _seconds(
    spec: FineTuneJobSpec, job: Job | None, speed: float | None, endpoint: str | None
) -> tuple[float | None, str]:
    """How long the training takes, and what that is based on."""
    epochs = spec.training.epochs
    metrics: dict[str, Any] = (job.status.get("metrics") or {}) if job else {}
    took, before = metrics.get("trainRuntimeSeconds"), _epochs(job)
    if speed is None and took and before and isinstance(epochs, int | float):
        return float(took) * float(epochs) / before, "as long as the last one, by epochs"
    if speed is None:
        return None, "nothing was trained yet; --tokens-per-second gives a speed"
    if not isinstance(epochs, int | float):
        return None, "training.epochs is auto, which prepare decides"
    storage = (spec.dataset.storage or spec.storage).model_dump(mode="json", by_alias=True)
    try:
        size = dataset_bytes(spec.dataset.source, storage, endpoint)
    except CliError as error:
        return None, error.message
    tokens = size / CHARACTERS_PER_TOKEN * float(epochs)
    return tokens / speed, f"{tokens:,.0f} tokens, guessed from the size of the dataset"


def _epochs(job: Job | None) -> float | None:
    epochs = ((job.spec if job else {}).get("training") or {}).get("epochs")
    return float(epochs) if isinstance(epochs, int | float) else None


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{max(1, minutes)} min"
