"""The process that trains.

    python -m finetune_trainer.train.recipe.train_worker <the stage's socket> <pid of the parent>

It has torch and the model. The stage that starts it has the store, the status and the decisions.
So the stage can still report when memory runs out, native code crashes or a stop comes.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from pathlib import Path

from finetune_trainer.contract import ExitCode, Reason
from finetune_trainer.runtime import child
from finetune_trainer.runtime.lifecycle import explain, set_up_libraries
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import Channel, as_failed
from finetune_trainer.train.recipe import unsloth_engine
from finetune_trainer.train.recipe.processes import (
    is_first,
    is_lost_peer,
    joined,
    record_failure,
)

INTERVAL_SECONDS = 0.2  # between two lines to the stage, which speaks to the API server less often

log = logging.getLogger(__name__)


def main(address: Path, parent: int) -> int:
    """Train. The exit status is that of the reason."""
    child.die_with_parent(parent)
    set_up_libraries()
    # The stage asks a worker that hangs for the stack of every thread, whatever it does.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    channel = Channel(address)
    work = unsloth_engine.or_transformers(channel.work)
    speaker = channel if is_first() else None
    if speaker is None:
        logging.getLogger("finetune_trainer").setLevel(logging.WARNING)
    with Reporter(speaker, INTERVAL_SECONDS) as reporter:
        try:
            if work.engine == "unsloth":
                unsloth_engine.import_first(work.workdir)
            # Here and not above: the environment must be set before the libraries are loaded.
            from finetune_trainer.train.recipe import sft  # noqa: PLC0415

            with joined(work.plan):
                trained = sft.fine_tune(work, reporter, speaker)
            if speaker:
                speaker.trained(trained)
        except unsloth_engine.UnslothFailedError as error:
            unsloth_engine.restart_with_transformers(work, error, channel)
            raise
        except Exception as error:  # the edge: nothing may end the worker without a reason
            return _fail(channel, error)
    return 0


def _fail(channel: Channel, error: Exception) -> int:
    """Say why, also to torchrun, which logs it."""
    failure = explain(error)
    record_failure(error)
    unknown = failure.reason is Reason.INTERNAL_ERROR
    if unknown:
        log.exception("The training failed")
    channel.failed(as_failed(failure, lost_peer=unknown and is_lost_peer(error)))
    return int(failure.reason.exit_code)


if __name__ == "__main__":
    exit_status = main(Path(sys.argv[1]), int(sys.argv[2]))
    if exit_status == ExitCode.STOPPED:
        # The libraries take seconds to unload, and the grace period is for the upload.
        sys.stdout.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
