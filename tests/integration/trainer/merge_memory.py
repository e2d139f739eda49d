"""What a merge takes of memory of its own, measured in a process of its own.

    python -m tests.integration.trainer.merge_memory <base> <adapter> <target>
        -> {"before": …, "most": …}      bytes of RssAnon: with both opened, and while writing

Pages of mapped files don't count: the kernel takes them back whenever it needs to.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch

from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.export.merge.model_folder import write_merged


class Sampling(threading.Thread):
    """The most anonymous memory from now on, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = anonymous_bytes()
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.001):
            self.most = max(self.most, anonymous_bytes())

    def stop(self) -> int:
        """The most that was seen."""
        self._done.set()
        self.join()
        return self.most


def anonymous_bytes() -> int:
    """Of this process, now (proc_pid_status(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Merge, and say what it took."""
    base, adapter, target = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(2)
    weights = MergedWeights.open(base, adapter)
    before = anonymous_bytes()
    sampling = Sampling()
    weights.check_changes()
    write_merged(weights, target)
    json.dump({"before": before, "most": sampling.stop()}, sys.stdout)


if __name__ == "__main__":
    main()
