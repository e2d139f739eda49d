"""What is said of the files that the quality gate found fault with."""

from __future__ import annotations

from finetune_trainer.contract import Artifact, Export, FileCheck, GateReport, Quality, Quantization
from finetune_trainer.export.gate import refusal

GOOD = Quality(kl_divergence=0.01, same_top_token=0.97, perplexity=5.5, max_kl_divergence=0.08)
BAD = GOOD.model_copy(update={"kl_divergence": 0.4, "passed": False})
OFF = "off by 0.4 nats per token, and 0.08 is the limit"


def check(
    kind: Quantization = Quantization.Q4_K_M, *problems: str, quality: Quality | None = GOOD
) -> FileCheck:
    return FileCheck(file=f"m-{kind}.gguf", quantization=kind, problems=problems, quality=quality)


def message(checks: list[FileCheck], export: Export, *, hidden: tuple[str, ...] = ()) -> str:
    """What is said where all files but `hidden` are in the output."""
    names = [each.file for each in checks if each.file not in hidden]
    files = [Artifact(path=f"gguf/{name}", bytes=1, sha256="aa") for name in names]
    return refusal.message(GateReport(files=tuple(checks)), files, export)


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
