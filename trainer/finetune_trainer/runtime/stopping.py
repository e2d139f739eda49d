"""What a stage does when its process is told to stop: it has some seconds to save its work."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_VARIABLE = "FINETUNE_GRACE_SECONDS"
# Kubernetes' own default; the operator sets the variable to what it gives the pod.
DEFAULT_GRACE_SECONDS = 30.0
SHARE = 0.8  # of the grace period; what is left is for the last words

Save = Callable[[float], str]
"""Saves until a deadline on the monotonic clock; says what the next attempt begins with."""

log = logging.getLogger(__name__)

_save: list[Save] = []
_stopping = threading.Event()


@contextmanager
def saving(save: Save) -> Iterator[None]:
    """While the block runs, `save` is called when the process is told to stop."""
    _save.append(save)
    try:
        yield
    finally:
        wait_if_stopping()
        _save.remove(save)


def stop() -> str:
    """Let the stage save; returns what the next attempt begins with, or an empty string."""
    _stopping.set()
    deadline = time.monotonic() + save_seconds()
    for save in reversed(_save):
        try:
            return save(deadline)
        except Exception:  # the process ends in any case, and its reason is not this
            log.exception("The work could not be saved")
    return ""


def save_seconds() -> float:
    """How long saving may take after the signal."""
    try:
        return SHARE * float(os.environ.get(GRACE_VARIABLE, DEFAULT_GRACE_SECONDS))
    except ValueError:
        return SHARE * DEFAULT_GRACE_SECONDS


def wait_if_stopping() -> None:
    """Never return once the process is being stopped: whoever stops it also ends it.

    The main thread calls it where its work may have ended because of the stop and not by itself.
    """
    while _stopping.is_set():
        time.sleep(1)
