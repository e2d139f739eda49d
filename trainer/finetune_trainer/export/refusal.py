"""What the stage says of the files that the quality gate found fault with."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_trainer.config import Export, Quantization
from finetune_trainer.export.results import FileCheck
from finetune_trainer.outcome import REJECTED, Artifact

UNQUANTIZED = (Quantization.F32, Quantization.F16, Quantization.BF16)


def with_quality(artifact: Artifact, check: FileCheck) -> Artifact:
    """The file's row with its figures, which pass only where nothing else is wrong with it."""
    if check.quality is None:
        return artifact
    quality = check.quality.model_copy(update={"passed": check.passed})
    return artifact.model_copy(update={"quality": quality})


def message(checks: Sequence[FileCheck], export: Export) -> str:
    """Which files fell short, by how much, and what to do; empty where all passed."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        return ""
    words = " ".join(f"{check.file}: {'; '.join(check.problems)}." for check in failed)
    where = f"kept apart in {REJECTED}/" if export.verify == "fail" else "published all the same"
    number = f"{len(failed)} of {len(checks)} GGUF files"
    verb = "falls" if len(failed) == 1 else "fall"
    return f"{number} {verb} short and {_is(failed)} {where}. {words} {_remedy(failed, export)}"


def _is(failed: Sequence[FileCheck]) -> str:
    return "is" if len(failed) == 1 else "are"


def _remedy(failed: Sequence[FileCheck], export: Export) -> str:
    """What helps the worst of them."""
    if not all(_only_rounded(check) for check in failed):
        return (
            "That is a fault of the conversion or of the base model, which no limit cures: don't "
            "serve such a file, and report it with manifest.json."
        )
    options = ["Take a larger type"]
    if not export.importance_matrix:
        options.append("set spec.export.importanceMatrix")
    options.append("raise its limit in spec.export.qualityLimits")
    return f"{', '.join(options[:-1])}, or {options[-1]}; only the export runs again."


def _only_rounded(check: FileCheck) -> bool:
    """Whether it is a quantization with nothing wrong but its divergence."""
    over = check.quality is not None and check.quality.over_limit
    return over and len(check.problems) == 1 and check.quantization not in UNQUANTIZED
