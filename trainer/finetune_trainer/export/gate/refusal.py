"""What the stage says of the files that the quality gate found fault with."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_trainer.contract import REJECTED, UNQUANTIZED, Artifact, Export, FileCheck, GateReport


def message(gate: GateReport, files: Sequence[Artifact], export: Export) -> str:
    """Which of the output's files fell short, by how much, and what to do; empty where none did."""
    names = {item.path.rpartition("/")[2] for item in files}
    checks = [check for check in gate.files if check.file in names]
    failed = [check for check in checks if not check.passed]
    if not failed:
        return ""
    words = " ".join(f"{check.file}: {'; '.join(check.problems)}." for check in failed)
    where = "published all the same" if export.verify == "warn" else f"kept apart in {REJECTED}/"
    number = f"{len(failed)} of {len(checks)} GGUF files"
    verbs = ("falls", "is") if len(failed) == 1 else ("fall", "are")
    beginning = f"{number} {verbs[0]} short and {verbs[1]} {where}."
    return f"{beginning} {words} {_remedy(failed, export)}"


def _remedy(failed: Sequence[FileCheck], export: Export) -> str:
    """What helps the worst of them."""
    if not all(_only_rounded(check) for check in failed):
        return (
            "That comes from the conversion or the base model and not from rounding: don't serve "
            "such a file, and report it with manifest.json."
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
