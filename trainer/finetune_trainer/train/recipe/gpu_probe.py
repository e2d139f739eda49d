"""A program: prints the GPUs that torch sees, as a line of JSON."""

from __future__ import annotations

import json

import torch


def main() -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    gpus = [
        {"name": p.name, "memory_bytes": p.total_memory, "capability": (p.major, p.minor)}
        for p in found
    ]
    print(json.dumps(gpus))  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
