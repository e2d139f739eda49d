"""Deleting a FineTuneJob leaves nothing behind, whatever it was at.

The garbage collector takes its time to learn of a new kind, so this comes late in the run.
"""

from __future__ import annotations

from finetune_trainer.contract import Stage
from tests.integration.operator.stage import CHILDREN, Namespace, prepared


def test_deleting_leaves_nothing_behind(here: Namespace) -> None:
    here.run_all()
    assert all(here.children(resource) for resource in CHILDREN)
    here.delete()
    here.wait_until_nothing_is_left()


def test_deleting_during_training_stops_it(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    here.start_pod(Stage.TRAIN)
    here.delete()
    here.wait_until_nothing_is_left()
