"""The worker in float32, on whatever processor; it notes what of the model this process holds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from finetune_trainer.base_model import loading
from finetune_trainer.train import ranks, worker

NOTE = "held-{}.json"


def main(request: Path) -> int:
    """Train; bfloat16 would hide the differences that the tests look for."""
    loading.compute_dtype = lambda: torch.float32
    gathered = ranks.gathered_state

    def noting(model: torch.nn.Module) -> Any:
        # Of the layers only: embeddings stay gathered between two passes.
        layers = [p for name, p in model.named_parameters() if ".layers." in name]
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in layers]
        held = {
            "held": sum(p.numel() for p in parts),
            "all": sum(p.numel() for p in layers),
        }
        note = request.parent / NOTE.format(os.environ.get("RANK", "0"))
        note.write_text(json.dumps(held))
        return gathered(model)

    ranks.gathered_state = noting
    return worker.main(request)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
