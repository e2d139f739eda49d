"""Fit the work to the machine: processes, what each does of a step, and the engine."""

from __future__ import annotations

import logging
import os

from finetune_trainer.outcome import Notice
from finetune_trainer.train import trackers
from finetune_trainer.train.devices import visible_gpus
from finetune_trainer.train.distributed import divide, processes_wanted
from finetune_trainer.train.engine import choose, missing_for_unsloth, model_type_of
from finetune_trainer.train.planning import Needs, plan_for
from finetune_trainer.train.work import Work

log = logging.getLogger(__name__)


def settle(work: Work, needs: Needs) -> tuple[Work, list[Notice]]:
    """The work as it will be done here, and what people should know about it.

    Raises StageError: InvalidConfig where the spec asks for what this machine can't do,
    OutOfGPUMemory where its GPUs are too small.
    """
    training = work.config.training
    trackers.check(training.report_to, os.environ)
    gpus = visible_gpus()
    wanted = processes_wanted(len(gpus), os.environ)
    planned = plan_for(work.config, work.plan, needs, gpus)
    plan, processes = divide(training, planned, wanted)
    if wanted > 1:
        log.info(
            "%d of %d devices train (%s): %d x %d examples each in a step",
            processes,
            wanted,
            plan.parallelism,
            plan.gradient_accumulation_steps,
            plan.batch_size,
        )
    choice = choose(
        work.config,
        gpus=gpus,
        processes=processes,
        model_type=model_type_of(work.model),
        missing=missing_for_unsloth() if gpus else None,
    )
    notice = choice.notice(training.engine, len(gpus))
    if choice.obstacle and notice is None:
        log.info("Engine: %s (%s)", choice.engine, choice.obstacle)
    else:
        log.info("Engine: %s", choice.engine)
    settled = work.model_copy(
        update={"plan": plan, "processes": processes, "engine": choice.engine}
    )
    return settled, [notice] if notice else []
