"""The log of every process of the trainer, for people or as JSON lines.

A JSON line has time (UTC), level, logger, message and stage, the figures of the line (step, loss …)
if it has any, and a traceback as `exception`. Values of credentials are blacked out.
"""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from finetune_trainer.contract.base import redact

FORMAT_VARIABLE = "FINETUNE_LOG_FORMAT"
STAGE_VARIABLE = "FINETUNE_STAGE"  # inherited by the processes that a stage starts

# Read by the libraries when they are loaded.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Threads that wait actively take time from those that work where CPUs are shared or limited.
    # Measured on two busy CPUs: training ran five times as fast without.
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Rows of any length come and go. Without this, the GPU's memory fragments until nothing fits.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",  # else it takes over standard output
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class LogFormat(StrEnum):
    HUMAN = "human"
    JSON = "json"


def set_up_libraries() -> None:
    """Log our own lines, and only warnings of the libraries; call it before importing them.

    FINETUNE_LOG_FORMAT chooses the format, also in the processes that this one starts.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    handler = logging.StreamHandler(sys.stdout)
    if os.environ.get(FORMAT_VARIABLE) == LogFormat.JSON:
        handler.setFormatter(JsonLine())
        logging.captureWarnings(True)
    else:
        handler.setFormatter(HumanLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("finetune_trainer").setLevel(logging.INFO)
    # On CPUs with AVX512-BF16, bitsandbytes looks for a kernel that training could not use anyway.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def begin_stage(stage: str) -> None:
    """Name the stage in each JSON line, also in processes that start from now on."""
    os.environ[STAGE_VARIABLE] = stage


class HumanLine(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class JsonLine(JsonFormatter):
    """One JSON object a line; what is passed as `extra` becomes fields of it."""

    def __init__(self) -> None:
        super().__init__(
            "{levelname}{name}{message}",
            style="{",
            timestamp="time",
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            json_ensure_ascii=False,
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        # Renaming comes before, so the names here are the final ones.
        log_data["level"] = str(log_data["level"]).lower()
        if stage := os.environ.get(STAGE_VARIABLE):
            log_data["stage"] = stage
        return log_data

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
