"""One verdict on each GGUF file, and what is said of those that the gate found fault with."""

from __future__ import annotations

import json

from finetune_trainer.contract import (
    Artifact,
    Export,
    FileVerdict,
    GateReport,
    Quality,
    Quantization,
)
from finetune_trainer.contract.verdict import explain_failures, word_for
from finetune_trainer.export.gate import rejects

GOOD = Quality(kl_divergence=0.01, same_top_token=0.97, perplexity=5.5, max_kl_divergence=0.08)
BAD = GOOD.model_copy(update={"kl_divergence": 0.4, "passed": False})
OFF = "off by 0.4 nats per token, and 0.08 is the limit"


def check(
    kind: Quantization = Quantization.Q4_K_M, *problems: str, quality: Quality | None = GOOD
) -> FileVerdict:
    return FileVerdict(file=f"m-{kind}.gguf", quantization=kind, problems=problems, quality=quality)


def message(checks: list[FileVerdict], export: Export, *, hidden: tuple[str, ...] = ()) -> str:
    """What is said where all files but `hidden` are in the output."""
    names = [each.file for each in checks if each.file not in hidden]
    files = [Artifact(path=f"gguf/{name}", bytes=1, sha256="aa") for name in names]
    return explain_failures(GateReport(files=tuple(checks)), files, export)


FINE = check(Quantization.Q8_0)
OVER = check(Quantization.Q4_K_M, OFF, quality=BAD)
OTHER_TOKENS = check(Quantization.Q6_K, "it splits text otherwise")


def test_where_all_passed_there_is_nothing_to_say() -> None:
    assert message([FINE], Export()) == ""


def test_a_file_over_its_limit_is_named_with_its_figures_and_the_remedy() -> None:
    assert message([FINE, OVER], Export()) == (
        f"1 of 2 GGUF files falls short and is kept apart in rejected/. m-Q4_K_M.gguf: {OFF}. "
        "Take a larger type, set spec.export.importanceMatrix, or raise its limit in "
        "spec.export.qualityLimits; only the export runs again."
    )


def test_an_importance_matrix_that_is_there_is_no_remedy() -> None:
    said = message([OVER], Export(importance_matrix=True))
    assert "importanceMatrix" not in said
    assert "Take a larger type, or raise its limit" in said


def test_a_file_that_is_not_in_the_output_is_not_spoken_of() -> None:
    assert message([FINE, OVER], Export(), hidden=(OVER.file,)) == ""
    assert message([FINE, OVER, OTHER_TOKENS], Export(), hidden=(FINE.file,)).startswith("2 of 2")


def test_what_no_limit_cures_says_so() -> None:
    sixteen = check(Quantization.F16, OFF, quality=BAD)
    unreadable = check(Quantization.Q4_K_M, "llama.cpp can't load it", quality=None)
    both = check(Quantization.Q4_K_M, OFF, "it splits text otherwise", quality=BAD)
    for failed in (OTHER_TOKENS, sixteen, unreadable, both):
        said = message([OVER, failed], Export())
        assert "2 of 2 GGUF files fall short and are kept apart" in said
        assert failed.problems[-1] in said
        assert "qualityLimits" not in said
        assert "report it with manifest.json" in said


def test_with_verify_warn_it_does_not_speak_of_rejected_files() -> None:
    said = message([OVER], Export(verify="warn"))
    assert "published all the same" in said
    assert "rejected" not in said


def test_wrong_tokens_fail_a_file_whatever_its_divergence_wherever_the_verdict_stands() -> None:
    wrong = check(Quantization.Q4_K_M, "llama.cpp splits text into other tokens")
    assert not wrong.passed
    assert wrong.quality is not None
    assert not wrong.quality.over_limit
    (listed,) = json.loads(GateReport(files=(wrong,)).model_dump_json())["files"]
    assert listed["quality"]["passed"] is False
    artifact = Artifact(path="gguf/m.gguf", bytes=1, sha256="aa", quality=wrong.quality)
    assert artifact.failed
    assert word_for(artifact, wrong) == word_for(artifact)


def test_a_manifest_of_an_earlier_version_is_read_with_one_verdict() -> None:
    """It could call the figures of a file good that had other problems."""
    former = check(Quantization.Q4_K_M, "llama.cpp splits text otherwise").model_dump(mode="json")
    former["quality"]["passed"] = True
    (read,) = GateReport.model_validate({"files": [former]}).files
    assert read.quality is not None
    assert read.passed is read.quality.passed is False
    former["problems"] = []
    (read,) = GateReport.model_validate({"files": [former]}).files
    assert read.quality is not None
    assert read.passed is read.quality.passed is True


def test_too_few_rows_to_judge_refuse_no_file() -> None:
    """The mean is over the limit, but not beyond doubt: `judge` leaves that open."""
    doubtful = BAD.model_copy(update={"judged": False, "passed": True, "kl_divergence_low": 0.01})
    verdict = check(quality=doubtful)
    assert word_for(None, verdict).text == "too few rows to judge"
    published = Artifact(path="gguf/m-Q4_K_M.gguf", bytes=1, sha256="aa", quality=doubtful)
    assert word_for(published).text == "too few rows to judge", "where only status is"
    assert not rejects(Export(), verdict)
    assert message([FINE, verdict], Export()) == ""
