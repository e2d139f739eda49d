"""The operator's log: text for people, or JSON lines with the names of the trainer's log.

A JSON line has time (UTC), level, logger, message, where there is one the traceback as `exception`,
and as `finetunejob` the namespace/name of the FineTuneJob that it is about.
"""

from __future__ import annotations

import logging
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

KOPF_ATTRIBUTES = ["k8s_ref", "k8s_skip", "settings"]  # Kopf's own, of no use to a reader


def configure_logging(log_format: str, level: str) -> None:
    """Log to standard error, as `human` or `json`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLine() if log_format == "json" else HumanLine())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Kopf reports each call of each handler; what they lead to is logged by `reconcile`.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    logging.getLogger("kopf.activities").setLevel(logging.WARNING)


class HumanLine(logging.Formatter):
    """What concerns one FineTuneJob begins with its namespace/name."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        if finetunejob := _finetunejob(record):
            record.message = f"[{finetunejob}] {record.message}"
        return super().formatMessage(record)


class JsonLine(JsonFormatter):
    """One JSON object a line; what is passed as `extra` becomes fields of it."""

    def __init__(self) -> None:
        super().__init__(
            "{levelname}{name}{message}",
            style="{",
            timestamp="time",
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            reserved_attrs=[*RESERVED_ATTRS, *KOPF_ATTRIBUTES],
            json_ensure_ascii=False,
        )

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        super().add_fields(log_data, record, message_dict)
        log_data["level"] = record.levelname.lower()
        if finetunejob := _finetunejob(record):
            log_data["finetunejob"] = finetunejob


def _finetunejob(record: logging.LogRecord) -> str | None:
    finetunejob: str | None = getattr(record, "finetunejob", None)
    reference = getattr(record, "k8s_ref", None)  # where Kopf logs about an object
    if finetunejob is None and reference:
        return f"{reference.get('namespace')}/{reference.get('name')}"
    return finetunejob
