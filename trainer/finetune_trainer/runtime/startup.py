"""What a process of the trainer sets up before it does anything: its log, and whom it trusts.

The log is for people, or JSON lines. Such a line has time (UTC), level, logger, message and stage,
the figures of the line (step, loss …) if it has any, and a traceback as `exception`. Values of
credentials are blacked out.

Certificate authorities of one's own are trusted beside the public ones, for every connection.
"""

from __future__ import annotations

import logging
import os
import ssl
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.contract.base import redact
from finetune_trainer.contract.output import CA_BUNDLES

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


# --- Certificate authorities -------------------------------------------------------------------

BUNDLE = "ca-bundle.pem"
# Of boto3, of httpx (the Hub's client) and OpenSSL, and of requests (experiment trackers).
VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def trust_given_authorities(workspace: Path) -> None:
    """Write one bundle of the public and the given certificates, and let all libraries read it.

    Also the libraries of processes that start later. Call it before the first connection. Raises
    StageError when a file is missing or holds no certificate.
    """
    given = os.environ.get(CA_BUNDLES)
    if not given:
        return
    import certifi  # noqa: PLC0415 - most stages do without

    named = {os.environ[name] for name in VARIABLES if os.environ.get(name)}
    parts = [Path(path).read_text() for path in sorted({certifi.where(), *named})]
    for entry in given.split(":"):
        field, _, path = entry.partition("=")
        parts.append(_certificates(field, Path(path)))
    workspace.mkdir(parents=True, exist_ok=True)
    bundle = workspace / BUNDLE
    bundle.write_text("\n".join(parts))
    for name in VARIABLES:
        os.environ[name] = str(bundle)


def _certificates(field: str, file: Path) -> str:
    try:
        text = file.read_text()
    except OSError as error:
        raise StageError(
            Reason.STORAGE_UNAVAILABLE,
            f"The certificates of {field} are not there ({file}: {error.strerror}): check that the "
            "ConfigMap or Secret exists and has the key.",
        ) from error
    except UnicodeDecodeError as error:
        raise _no_certificate(field, "it is not text") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise _no_certificate(field, str(error)) from error
    return text


def _no_certificate(field: str, cause: str) -> StageError:
    return StageError(
        Reason.INVALID_CONFIG,
        f"The key that {field} names holds no certificates ({cause}): put PEM there, which begins "
        "with -----BEGIN CERTIFICATE-----.",
    )
