"""The log: our own lines, and of the libraries only what matters; for people or as JSON lines.

A JSON line has time (UTC), level, logger, message, stage and, where there are some, the figures of
the line (step, loss …) and the traceback as `exception`. Values of credentials are blacked out.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from enum import StrEnum
from typing import Any

from pythonjsonlogger.json import JsonFormatter

FORMAT_VARIABLE = "FINETUNE_LOG_FORMAT"
STAGE_VARIABLE = "FINETUNE_STAGE"  # inherited by the processes that a stage starts

# Read by the libraries when they are loaded.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Threads that wait actively take the time of those that work, wherever the CPUs are shared or
    # limited: measured on two busy CPUs, training ran five times as fast without.
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Rows of any length come and go: without, the GPU's memory falls to pieces that fit nothing.
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
_SECRET_NAME = re.compile(r"SECRET|TOKEN$|PASSWORD|API_KEY|ACCESS_KEY")
_SECRET_LENGTH = 8  # characters; anything shorter would black out ordinary words
_USER_IN_URL = re.compile(r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)")


class LogFormat(StrEnum):
    """How a line of the log is written."""

    HUMAN = "human"
    JSON = "json"


def set_up_libraries(log_format: LogFormat | None = None) -> None:
    """Log our own lines and of the libraries only warnings; call it before importing them.

    Without a format, FINETUNE_LOG_FORMAT decides, which the processes that this one starts read
    as well.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    chosen = log_format or _format_of_environment()
    os.environ[FORMAT_VARIABLE] = chosen.value
    handler = logging.StreamHandler(sys.stdout)
    if chosen is LogFormat.JSON:
        handler.setFormatter(JsonLine())
        logging.captureWarnings(True)
    else:
        handler.setFormatter(HumanLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("finetune_trainer").setLevel(logging.INFO)
    # On CPUs with AVX512-BF16, bitsandbytes looks for a kernel that training could not use anyway.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def begin_stage(stage: str) -> None:
    """Let each line say which stage it belongs to, also those of processes started from now on."""
    os.environ[STAGE_VARIABLE] = stage


def redact(text: str) -> str:
    """Black out the values of credentials in the environment, and of users in URLs."""
    for name, value in os.environ.items():
        if len(value) >= _SECRET_LENGTH and _SECRET_NAME.search(name):
            # As it is, and as JSON writes it.
            text = text.replace(value, "***").replace(json.dumps(value)[1:-1], "***")
    return _USER_IN_URL.sub("***", text)


class HumanLine(logging.Formatter):
    """The time of day and the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
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
        """Add the stage, and write levels as the operator does."""
        # Only here are the names the final ones: renaming comes before.
        log_data["level"] = str(log_data["level"]).lower()
        if stage := os.environ.get(STAGE_VARIABLE):
            log_data["stage"] = stage
        return log_data

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        return redact(super().format(record))


def _format_of_environment() -> LogFormat:
    value = os.environ.get(FORMAT_VARIABLE, LogFormat.HUMAN)
    try:
        return LogFormat(value)
    except ValueError:
        return LogFormat.HUMAN
