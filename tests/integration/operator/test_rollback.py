"""`rollbackTo` and the history of versions, on the real API server."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from finetune_trainer.contract import (
    Fingerprints,
    Reason,
    Resolved,
    Stage,
    StageResult,
    VersionSummary,
)
from tests.integration.operator.stage import (
    EXPORTED_VERSION,
    FOLDER,
    Namespace,
    exported,
    prepared,
    trained,
)

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT
OLD = "aaaaaaaaaaaa"
PAGE = Path(__file__).parents[3] / "docs" / "publishing.md"


def stored(current: str) -> tuple[VersionSummary, ...]:
    newest = VersionSummary(
        version=EXPORTED_VERSION, created="2026-11-24T11:00:00Z", dataset_rows=120, eval_loss=0.4
    )
    old = VersionSummary(version=OLD, created="2026-11-20T11:00:00Z", dataset_rows=90)
    return tuple(
        each.model_copy(update={"current": each.version == current}) for each in (newest, old)
    )


ROLLED_BACK = StageResult(
    stage=PREPARE,
    reason=Reason.SUCCEEDED,
    message=f"rolled back to version {OLD}",
    resolved=Resolved(
        fingerprints=Fingerprints(prepare="prepare-0", train="train-0", export="export-0"),
        dataset_etag="old",
        dataset_rows=90,
        model_revision="old",
    ),
    complete=tuple(Stage),
    version=OLD,
    manifest_uri=f"{FOLDER}/versions/{OLD}/manifest.json",
    versions=stored(OLD),
)


def finish_once(here: Namespace) -> None:
    here.apply()
    for result in (prepared(), trained(), exported()):
        told = {"versions": stored(EXPORTED_VERSION)} if result.stage is EXPORT else {}
        here.succeed(result.model_copy(update=told))
    here.wait_phase("Succeeded")


def states(here: Namespace) -> dict[str, str]:
    return {each["version"]: each["state"] for each in here.status()["versions"]}


def test_back_and_forth_without_a_training(here: Namespace) -> None:
    finish_once(here)
    assert states(here) == {EXPORTED_VERSION: "Current", OLD: "Available"}
    here.apply(rollbackTo=OLD)
    here.wait_phase("Preparing")
    assert here.condition("Ready")[0] == "True"
    here.succeed(ROLLED_BACK)
    status = here.wait_phase("Succeeded")
    assert status["version"] == OLD
    assert states(here) == {EXPORTED_VERSION: "Available", OLD: "Current"}
    assert f"Rolled back to version {OLD}" in here.condition("Ready")[2]

    here.apply()
    here.succeed(
        prepared(*Stage).model_copy(update={"versions": stored(EXPORTED_VERSION)}),
    )
    assert here.wait_phase("Succeeded")["version"] == EXPORTED_VERSION
    assert states(here) == {EXPORTED_VERSION: "Current", OLD: "Available"}
    assert here.jobs().count(("train", 1)) == here.jobs().count(("export", 1)) == 1


def test_a_version_that_is_not_there_is_told_and_the_present_one_stays(here: Namespace) -> None:
    finish_once(here)
    here.apply(rollbackTo=OLD)
    here.fail(PREPARE, Reason.VERSION_NOT_FOUND, f"spec.rollbackTo: the version {OLD} is gone.")
    status = here.wait_phase("Failed")
    assert status["version"] == EXPORTED_VERSION
    assert here.condition("Ready")[0] == "True"
    assert here.condition("Degraded")[1] == "VersionNotFound"
    here.apply()
    here.succeed(prepared(*Stage))
    here.wait_phase("Succeeded")


def test_the_command_of_the_docs_prints_the_history(here: Namespace) -> None:
    finish_once(here)
    (command,) = re.findall(
        r"kubectl (get ftj support-bot -o (?:.|\\\n)*?versions(?:.|\\\n)*?)\n\n", PAGE.read_text()
    )
    words = shlex.split(command.replace("support-bot", "support").replace("\\\n", ""))
    printed = here.plane.kubectl(*words, "-n", here.name)
    rows = [line.split("\t") for line in printed.splitlines()]
    assert rows == [
        [EXPORTED_VERSION, "Current", "2026-11-24T11:00:00Z", "120", "0.4"],
        [OLD, "Available", "2026-11-20T11:00:00Z", "90", ""],
    ]
