"""The process that trains: `python -m finetune_trainer.train.recipe.worker work.json`.

It has torch and the model; the stage that starts it has the store, the status and the decisions.
So memory that ran out, a crash of native code or a stop never takes the stage's word with it.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from finetune_trainer.contract import ExitCode, Reason
from finetune_trainer.runtime.die_with_parent import die_with_parent
from finetune_trainer.runtime.failures import explain
from finetune_trainer.runtime.logs import set_up_libraries
from finetune_trainer.runtime.progress import Reporter
from finetune_trainer.train.link.channel import Channel
from finetune_trainer.train.link.processes import is_echo, is_first, write_first
from finetune_trainer.train.link.work import FAILED, TRAINED, Work, as_failed
from finetune_trainer.train.recipe import unsloth_engine

INTERVAL_SECONDS = 0.2  # between two lines to the stage, which speaks to the API server less often

log = logging.getLogger(__name__)


def main(request: Path) -> int:
    """Train; the exit status is that of the reason."""
    die_with_parent(os.getppid())
    set_up_libraries()
    work = Work.model_validate_json(request.read_bytes())
    channel = Channel(work.room) if is_first() else None
    if channel is None:
        logging.getLogger("finetune_trainer").setLevel(logging.WARNING)
    with Reporter(channel, INTERVAL_SECONDS) as reporter:
        try:
            if work.engine == "unsloth":
                unsloth_engine.import_first(work.room)
            # Here and not above: the environment must be set before the libraries are loaded.
            from finetune_trainer.train.recipe import ranks, sft  # noqa: PLC0415

            with ranks.joined(work.plan):
                trained = sft.fine_tune(work, reporter, channel)
        except unsloth_engine.EngineFailedError as error:
            unsloth_engine.fall_back(work, request, error, channel)
            raise
        except Exception as error:  # the edge: nothing may end the worker without a reason
            if is_echo(error):
                return int(ExitCode.OTHER)
            failure = explain(error)
            if failure.reason is Reason.INTERNAL_ERROR:
                log.exception("The training failed")
            write_first(work.room / FAILED, as_failed(failure).model_dump_json())
            return int(failure.reason.exit_code)
    if is_first():
        (work.room / TRAINED).write_text(trained.model_dump_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    exit_status = main(Path(sys.argv[1]))
    if exit_status == ExitCode.STOPPED:
        # The libraries take seconds to unload, and the grace period is for the upload.
        sys.stdout.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
