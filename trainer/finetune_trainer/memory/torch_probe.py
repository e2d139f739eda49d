"""A program: what torch is built for and which GPUs it can use, a `TorchBuild` as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from finetune_trainer.memory.gpus import Gpu, TorchBuild


def look_with_torch() -> TorchBuild:
    """Count the GPUs with torch, and run a kernel on each."""
    version = torch.version
    flags = getattr(torch._C, "_cuda_getArchFlags", None)
    found, errors = [], []
    try:
        if torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
            torch.cuda.init()  # type: ignore[no-untyped-call] # it says what is wrong
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            if (error := _try_kernel(index)) is not None:
                errors.append(f"{about.name}: {error}")
                continue
            found.append(Gpu(about.name, about.total_memory, (about.major, about.minor)))
    except (RuntimeError, AssertionError) as error:
        errors.append(_first_line(error))
    return TorchBuild(
        version=str(torch.__version__),
        cuda=version.cuda,
        hip=version.hip,
        architectures=tuple((flags() or "").split()) if flags else (),
        gpus=tuple(found),
        error="; ".join(errors) or None,
    )


def _try_kernel(index: int) -> str | None:
    """What is wrong with a GPU; nothing where it is only full for the moment."""
    try:
        torch.ones(8, device=f"cuda:{index}").add_(1).sum().item()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    print(json.dumps(asdict(look_with_torch())))  # noqa: T201 - the answer
