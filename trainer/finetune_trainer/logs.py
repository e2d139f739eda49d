"""The log: our own lines, and of the libraries only what matters."""

from __future__ import annotations

import logging
import os
import sys

# Read by the libraries when they are loaded.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Threads that wait actively take the time of those that work, wherever the CPUs are shared or
    # limited: measured on two busy CPUs, training ran five times as fast without.
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def set_up_libraries() -> None:
    """Log our own lines and of the libraries only warnings; call it before importing them."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
    )
    logging.getLogger("finetune_trainer").setLevel(logging.INFO)
