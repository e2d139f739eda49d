"""The termination message: what survives the kubelet's limit."""

from __future__ import annotations

from finetune_trainer.config import Fingerprints, Resolved, Stage
from finetune_trainer.outcome import (
    TERMINATION_MESSAGE_LIMIT,
    Artifact,
    Reason,
    StageResult,
)


def result(artifacts: int, text: int = 10) -> StageResult:
    return StageResult(
        stage=Stage.EXPORT,
        reason=Reason.SUCCEEDED,
        message="ü" * text,
        artifacts=tuple(
            Artifact(path=f"gguf/model-{n}.gguf", bytes=n, sha256="a" * 64)
            for n in range(artifacts)
        ),
        manifest_uri="s3://models/run/manifest.json",
    )


def test_a_message_comes_back_as_it_was() -> None:
    sent = result(3)
    assert StageResult.from_message(sent.to_message().decode()) == sent


def test_what_prepare_found_out_comes_back_as_it_was() -> None:
    sent = StageResult(
        stage=Stage.PREPARE,
        reason=Reason.SUCCEEDED,
        message="28 examples",
        resolved=Resolved(
            fingerprints=Fingerprints(prepare="a" * 64, train="b" * 64, export="c" * 64),
            dataset_etag="etag",
            dataset_rows=28,
            model_revision="d" * 40,
        ),
        complete=(Stage.PREPARE, Stage.TRAIN),
    )
    assert StageResult.from_message(sent.to_message().decode()) == sent


def test_artifacts_that_do_not_fit_are_left_to_the_manifest() -> None:
    message = result(100).to_message()
    kept = StageResult.from_message(message.decode())
    assert len(message) <= TERMINATION_MESSAGE_LIMIT
    assert kept is not None
    assert 0 < len(kept.artifacts) < 100
    assert kept.manifest_uri == "s3://models/run/manifest.json"


def test_a_long_text_is_cut() -> None:
    message = result(2, text=10_000).to_message()
    kept = StageResult.from_message(message.decode())
    assert len(message) <= TERMINATION_MESSAGE_LIMIT
    assert kept is not None
    assert kept.message.startswith("üüü")


def test_another_text_is_no_result() -> None:
    assert StageResult.from_message("Killed") is None


def test_each_reason_of_the_trainer_has_an_exit_code() -> None:
    assert Reason.DATASET_NOT_FOUND.exit_code == 10
    assert Reason.MODEL_ACCESS_DENIED.exit_code == 11
    assert Reason.STOPPED.exit_code == 14
    assert Reason.INTERNAL_ERROR.exit_code == 1
