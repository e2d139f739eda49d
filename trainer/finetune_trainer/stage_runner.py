"""Run a stage so that, whatever happens, it ends with a reason, an exit code and one clear line."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from finetune_trainer.contract import (
    PreparedRunConfig,
    Reason,
    RunConfig,
    Stage,
    StageError,
    StageResult,
)
from finetune_trainer.memory.remedies import with_remedy
from finetune_trainer.runtime import child, lifecycle
from finetune_trainer.runtime.lifecycle import begin_stage, explain
from finetune_trainer.runtime.reporter import Reporter

STOPS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)


def perform(stage: Stage, config: RunConfig, workspace: Path, reporter: Reporter) -> StageResult:
    """Run one stage in a folder of its own below `workspace`, which is removed afterwards."""
    begin_stage(stage)
    child.hide_from_children()
    workdir = workspace / stage
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    result = _run(stage, config, workdir, reporter)
    reporter.done(result.message)
    shutil.rmtree(workdir, ignore_errors=True)
    return result


def guarded(stage: Stage, work: Callable[[], StageResult]) -> StageResult:
    """Do the work; an error becomes a result that names its reason."""
    try:
        result = work()
    except Exception as error:  # the edge: nothing may end a stage without a reason
        failure = with_remedy(explain(error))
        if failure.reason is Reason.INTERNAL_ERROR:
            log.exception("%s failed", stage)
        log.error("%s: %s", failure.reason, failure.message)  # noqa: TRY400 - one line, no trace
        return as_result(stage, failure)
    if result.reason is Reason.SUCCEEDED:
        log.info("%s: %s", stage, result.message)
    else:  # with artifacts all the same
        log.error("%s: %s", result.reason, result.message)
    return result


def as_prepared(config: RunConfig) -> PreparedRunConfig:
    """The same for the stages after `prepare`; StageError when `resolved` is missing."""
    if config.resolved is None:
        raise StageError(
            Reason.INVALID_CONFIG,
            "run.json has no `resolved`: run `prepare` first and pass on what it reports.",
        )
    return PreparedRunConfig.model_validate(config.model_dump())


def as_result(stage: Stage, failure: StageError) -> StageResult:
    return StageResult(
        stage=stage,
        reason=failure.reason,
        message=failure.message,
        dataset=failure.dataset,
        notices=failure.notices,
    )


def write_termination_message(result: StageResult, path: Path | None) -> None:
    """Leave the result where the kubelet reads it."""
    if path is None:
        return
    try:
        path.write_bytes(result.to_message())
    except OSError as error:
        log.warning("The termination message can't be written to %s: %s", path, error)


def stop_on_signal(stage: Callable[[], Stage], path: Path | None, reporter: Reporter) -> None:
    """On SIGTERM or SIGINT, save what the stage can save, write the result and end.

    Python runs signal handlers only between its own instructions, and a quantization stays in
    native code for minutes. So the signal wakes a thread through a pipe, and that ends the process.
    """
    wake, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in STOPS:
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        while os.read(wake, 1)[0] not in STOPS:  # others end what computes too long
            pass
        then = lifecycle.stop() or "the stage starts anew with the next attempt"
        result = StageResult(
            stage=stage(), reason=Reason.STOPPED, message=f"Stopped by a signal; {then}."
        )
        write_termination_message(result, path)
        log.warning("%s: %s", result.reason, result.message)
        child.kill_running()
        reporter.close()
        sys.stdout.flush()
        os._exit(Reason.STOPPED.exit_code)

    threading.Thread(target=wait, name="stop", daemon=True).start()


def _run(stage: Stage, config: RunConfig, workdir: Path, reporter: Reporter) -> StageResult:
    # Imported when needed: each brings seconds of libraries that the others do without.
    if stage is Stage.PREPARE:
        from finetune_trainer.prepare.prepare_stage import run as prepare  # noqa: PLC0415

        return prepare(config, workdir, reporter)
    prepared = as_prepared(config)
    if stage is Stage.TRAIN:
        from finetune_trainer.train.train_stage import run as train  # noqa: PLC0415

        return train(prepared, workdir, reporter)
    from finetune_trainer.export.export_stage import run as export  # noqa: PLC0415

    return export(prepared, workdir, reporter)
