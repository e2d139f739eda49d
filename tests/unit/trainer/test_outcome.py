"""The termination message: what survives the kubelet's limit."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from finetune_trainer.contract import (
    Artifact,
    BadRow,
    DatasetSummary,
    Fingerprints,
    Notice,
    NoticeCode,
    Quality,
    Quantization,
    Reason,
    Resolved,
    Stage,
    StageResult,
)
from finetune_trainer.contract.outcome import TERMINATION_MESSAGE_LIMIT
from finetune_trainer.contract.output import MOST_FILES


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


def test_no_credential_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\n-----END PRIVATE KEY-----"
    monkeypatch.setenv("FINETUNE_SIGNING_KEY", key)
    monkeypatch.setenv("FINETUNE_DATASET_AWS_SECRET_ACCESS_KEY", 'quo"ted-secret')
    secrets = ("opensesame", "MIGHAgEAMBMGByqGSM49", "ted-secret")
    said = (
        "The store at https://me:opensesame@store.example:9000/a refused: "
        f'MIGHAgEAMBMGByqGSM49, quo"ted-secret, {key}'
    )
    sent = StageResult(
        stage=Stage.PREPARE,
        reason=Reason.STORAGE_UNAVAILABLE,
        message=said,
        dataset=DatasetSummary(rows=1, first_invalid=(BadRow(row=2, cause=said),)),
        notices=(Notice(code=NoticeCode.LOSS_FLAT, evidence=said, remedy=said),),
    ).to_message()
    assert not [secret for secret in secrets if secret in sent.decode()]
    read = StageResult.from_message(sent.decode())
    assert read is not None
    assert read.message.startswith("The store at https://***@store.example:9000/a refused: ***")
    assert read.dataset is not None
    assert read.dataset.first_invalid[0].cause == read.message


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


MODEL = "Mistral-Small-3.2-24B-Instruct-2506"
MEASURED = Quality(
    kl_divergence=0.031321436718,
    same_top_token=0.919117647058,
    perplexity=5.8173214367,
    max_kl_divergence=0.08,
)
BAD = MEASURED.model_copy(update={"kl_divergence": 0.41234567, "passed": False})


def file(path: str, quality: Quality | None = None) -> Artifact:
    return Artifact(path=path, bytes=14_333_908_832, sha256="a" * 64, quality=quality)


ALL = tuple(Quantization)[:MOST_FILES]


def everything(rejected: tuple[Quantization, ...] = ()) -> tuple[Artifact, ...]:
    """What an export of a large model with all GGUF types leaves: 40 files, as the manifest has
    them."""
    beside = ("config", "generation_config", "tokenizer", "tokenizer_config", "special_tokens_map")
    return (
        file("Modelfile"),
        file("README.md"),
        file("SHA256SUMS"),
        *(file(f"adapter/{name}.json") for name in ("adapter_config", *beside[2:])),
        file("adapter/adapter_model.safetensors"),
        file("dataset-report.json"),
        file(f"gguf/{MODEL}-LoRA-F32.gguf"),
        *(file(f"gguf/{MODEL}-{q}.gguf", MEASURED) for q in ALL if q not in rejected),
        *(file(f"merged/{name}.json") for name in beside),
        file("merged/model.safetensors.index.json"),
        *(file(f"merged/model-{n:05d}-of-00014.safetensors") for n in range(1, 15)),
        *(file(f"rejected/{MODEL}-{q}.gguf", BAD) for q in rejected),
        file("report.html"),
    )


def sent(**fields: object) -> StageResult:
    """The result as the operator reads it, within the kubelet's limit."""
    given = {
        "stage": Stage.EXPORT,
        "reason": Reason.SUCCEEDED,
        "message": f"40 files in s3://models/{MODEL}",
        "manifest_uri": f"s3://models/{MODEL}/manifest.json",
        **fields,
    }
    message = StageResult.model_validate(given).to_message()
    assert len(message) <= TERMINATION_MESSAGE_LIMIT
    kept = StageResult.from_message(message.decode())
    assert kept is not None
    return kept


def test_all_gguf_files_of_a_large_model_arrive_with_their_quality() -> None:
    assert len(everything()) == 40
    kept = sent(artifacts=everything())
    paths = [each.path for each in everything()]
    measured = [each.path for each in kept.artifacts if each.quality is not None]
    assert measured == [f"gguf/{MODEL}-{q}.gguf" for q in ALL]
    assert f"gguf/{MODEL}-LoRA-F32.gguf" in [each.path for each in kept.artifacts]
    kept_paths = [each.path for each in kept.artifacts]
    assert kept_paths == [path for path in paths if path in kept_paths], "in the given order"
    assert kept.message == f"40 files in s3://models/{MODEL}"


def test_figures_are_rounded_to_six_digits() -> None:
    (kept,) = sent(artifacts=(file("gguf/model-Q4_K_M.gguf", MEASURED),)).artifacts
    assert kept.quality == Quality(
        kl_divergence=0.0313214, same_top_token=0.919118, perplexity=5.81732, max_kl_divergence=0.08
    )


def test_files_of_the_merged_model_go_first() -> None:
    given = [each for each in everything() if not each.path.startswith(f"gguf/{MODEL}-")]
    lost = {each.path for each in given} - {
        each.path for each in sent(artifacts=tuple(given)).artifacts
    }
    assert lost
    assert all(path.startswith("merged/") for path in lost)


def test_a_failed_gate_arrives_with_every_file_and_the_begin_of_a_long_text() -> None:
    rejected = (Quantization.IQ4_XS, Quantization.Q3_K_M)
    text = "ü" * 2000
    kept = sent(
        reason=Reason.QUALITY_GATE_FAILED, message=text, artifacts=everything(rejected=rejected)
    )
    measured = [each for each in kept.artifacts if each.quality is not None]
    assert len(measured) == len(ALL)
    assert [each.path for each in measured if each.quality and not each.quality.passed] == [
        f"rejected/{MODEL}-{q}.gguf" for q in rejected
    ]
    assert len(kept.message) > 100


def test_a_failed_file_is_the_last_to_go() -> None:
    good = tuple(file(f"gguf/{'m' * 100}-{n}.gguf", MEASURED) for n in range(40))
    kept = sent(artifacts=(*good[:20], file("rejected/bad.gguf", BAD), *good[20:]))
    assert "rejected/bad.gguf" in [each.path for each in kept.artifacts]
    assert len(kept.artifacts) > 5


def test_what_prepare_says_of_bad_rows_gives_way_to_the_quality_of_a_cached_export() -> None:
    rows = tuple(BadRow(row=n, cause="the response is empty " * 8) for n in range(10))
    notice = Notice(code=NoticeCode.LOSS_FLAT, evidence="e" * 200, remedy="r" * 200)
    kept = sent(
        stage=Stage.PREPARE,
        artifacts=everything(),
        dataset=DatasetSummary(rows=120, invalid=10, first_invalid=rows),
        notices=(notice,),
    )
    assert len([each for each in kept.artifacts if each.quality]) == len(ALL)
    assert kept.dataset is not None
    assert kept.dataset.invalid == 10


def test_a_notice_of_a_newer_trainer_is_read_as_a_warning() -> None:
    newer = {"code": "GradientNoisy", "evidence": "e", "remedy": "r"}
    result = {"stage": "train", "reason": "Succeeded", "message": "", "notices": [newer]}
    found = StageResult.from_message(json.dumps(result))
    assert found is not None
    assert [(each.code, each.warning) for each in found.notices] == [("GradientNoisy", True)]
    assert not Notice(code=NoticeCode.RESUMED, evidence="e", remedy="r").warning
    with pytest.raises(ValidationError):
        Notice(code="no such word", evidence="e", remedy="r")


def test_another_text_is_no_result() -> None:
    assert StageResult.from_message("Killed") is None


def test_each_reason_of_the_trainer_has_an_exit_code() -> None:
    assert Reason.DATASET_NOT_FOUND.exit_code == 10
    assert Reason.MODEL_ACCESS_DENIED.exit_code == 11
    assert Reason.STOPPED.exit_code == 14
    assert Reason.OUT_OF_MEMORY.exit_code == 16
    assert Reason.INTERNAL_ERROR.exit_code == 1
