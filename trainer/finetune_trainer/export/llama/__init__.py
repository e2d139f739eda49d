"""llama.cpp's library in a process of its own, which it may abort.

worker    what it does for a request
session   a model in memory: tokens, log-probabilities, answers
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from finetune_trainer.runtime import child

WORKER = "finetune_trainer.export.llama.worker"

log = logging.getLogger(__name__)


class LlamaError(Exception):
    """llama.cpp could not do it; the message is the last thing that it said."""


def call(**request: Any) -> dict[str, Any]:
    """Send a request and wait for the answer; raises LlamaError."""
    done = child.run([sys.executable, "-m", WORKER], json.dumps(request))
    if done.status != 0:
        log.error("llama.cpp failed:\n%s", done.errors[-4000:])
        raise LlamaError(done.last_line())
    answer: dict[str, Any] = json.loads(done.output)
    return answer
