"""The gate's verdict on a GGUF file: what it is made of, and its words.

The gate decides (FileVerdict). Status and events, the page, the card and a terminal show a verdict
in the words that stand here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, ValidationInfo, field_validator

from finetune_trainer.contract.base import Base
from finetune_trainer.contract.output import UNQUANTIZED, Export, Quantization

if TYPE_CHECKING:
    from finetune_trainer.contract.artifacts import Artifact

REJECTED = "rejected"  # folder of a version for files that the quality gate refuses


class Quality(Base):
    """What was measured on a GGUF file in llama.cpp, over the answers of held-out rows; of training
    rows where none are held out."""

    kl_divergence: Annotated[float, Field(alias="klDivergence")]
    """Mean Kullback-Leibler divergence of the next token, in nats per token: of a quantization from
    the 16-bit file that it was made of; of that file from base model and adapter; of the adapter's
    own file, which is taken away from that file, from the base model."""

    same_top_token: float
    """Share of tokens at which both find the same next token most likely, 0 to 1."""

    perplexity: float
    """Perplexity of the answers; of the adapter's own file, with it taken away."""

    max_kl_divergence: Annotated[float | None, Field(alias="maxKLDivergence")] = None
    """The limit that the divergence was held against."""

    kl_divergence_low: Annotated[float | None, Field(alias="klDivergenceLow")] = None
    """Lower bound of the 95% confidence interval of klDivergence. A file is refused where this is
    over the limit."""

    judged: bool = True
    """False where the rows measured are too few to tell whether the file keeps its limit, which
    refuses no file."""

    passed: bool = True
    """Whether the file may be used: false where the divergence is over its limit beyond doubt,
    where it finds other top tokens or answers worse than the base model, or where llama.cpp reads
    the file otherwise than it was trained."""

    @property
    def over_limit(self) -> bool:
        """Whether the divergence is over its limit beyond doubt."""
        low = self.kl_divergence if self.kl_divergence_low is None else self.kl_divergence_low
        return self.max_kl_divergence is not None and low > self.max_kl_divergence

    def rounded(self) -> Self:
        """The same with six significant digits a figure, which is more than they are worth."""
        figures = {name: value for name, value in self if isinstance(value, float)}
        short = {name: float(f"{value:.6g}") for name, value in figures.items()}
        return self.model_copy(update=short)


class FileVerdict(Base):
    """The gate's verdict on one GGUF file, or on the merged model: it passes where the gate found
    no problem."""

    file: str
    """Its name, e.g. model-Q4_K_M.gguf; of the merged model its folder's."""

    quantization: Quantization
    problems: tuple[str, ...] = ()
    """Why it may not be used, in sentences; empty when it may."""

    measured_problems: int = 0
    """How many of the problems are about figures, as rounding makes them."""

    quality: Quality | None = None
    """None where nothing was measured (verify: off, or no held-out rows to measure on)."""

    @field_validator("quality")
    @classmethod
    def _says_the_same(cls, quality: Quality | None, info: ValidationInfo) -> Quality | None:
        # `passed` travels with the figures, into status and into the manifest's list of files. So
        # it is the verdict of the whole file and not of its divergence alone, also where a manifest
        # of an earlier version said otherwise.
        if quality is None or "problems" not in info.data:
            return quality
        return quality.model_copy(update={"passed": not info.data["problems"]})

    @property
    def passed(self) -> bool:
        """Whether the file may be used."""
        return not self.problems


class Sample(Base):
    """A held-out prompt, and what the models answer to it with greedy decoding."""

    prompt: str
    expected: str
    base: str | None = None
    """The base model's answer; None where it was not asked."""

    tuned: str | None = None
    """The answer of the smallest GGUF file that passed, or of the merged model where there is no
    such file; None where no time was left to ask it."""

    stopped: bool
    """Whether the tuned model ended its answer itself."""


class GateReport(Base):
    """Everything that was measured on the files of one export."""

    rows: int = 0
    """Rows whose answers were measured on."""

    tokens: int = 0
    """Tokens of these answers."""

    held_out: bool = True
    """False where the dataset has no held-out rows, and training rows stand in for them."""

    base_perplexity: float | None = None
    """Of the base model on these tokens."""

    tuned_perplexity: float | None = None
    """Of base model and adapter by transformers, before any conversion."""

    merged: FileVerdict | None = None
    """On the merged model in 16 bits."""

    files: tuple[FileVerdict, ...] = ()
    """On the GGUF files."""

    notices: tuple[str, ...] = ()
    """What is worth knowing and refuses no file."""

    samples: tuple[Sample, ...] = ()


# --- In words ----------------------------------------------------------------------------------


class Tone(StrEnum):
    """How good the news is; the page and the terminal mark it with a colour."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"
    PLAIN = "plain"


@dataclass(frozen=True)
class Statement:
    """Some words, and their tone."""

    tone: Tone
    text: str


PASSED = Statement(Tone.GOOD, "passed")
NOT_MEASURED = Statement(Tone.PLAIN, "not measured")
TOO_FEW_ROWS = Statement(Tone.PLAIN, "too few rows to judge")
NOT_GOOD_ENOUGH = Statement(Tone.BAD, "not good enough")
REFUSED = Statement(Tone.BAD, "refused")


def word_for(artifact: Artifact | None, verdict: FileVerdict | None = None) -> Statement:
    """The verdict on a file in a word or two, for a table.

    `artifact` is the file in the output folder, if it is there; `verdict` the gate's, if it is
    known, as it isn't where only status is.
    """
    if artifact is not None and artifact.rejected:
        return REFUSED
    if (verdict is not None and not verdict.passed) or (artifact is not None and artifact.failed):
        return NOT_GOOD_ENOUGH
    quality = verdict.quality if verdict else artifact.quality if artifact else None
    if quality is None:
        return NOT_MEASURED
    return PASSED if quality.judged else TOO_FEW_ROWS


def over_limit(divergence: float, limit: float) -> str:
    """The problem of a file that differs too much, for FileVerdict.problems."""
    return (
        f"its answers are off by a mean KL divergence of {divergence:.3g} nats per token, and "
        f"{limit:.3g} is the limit (spec.export.qualityLimits)"
    )


def other_top_tokens(share: float, limit: float) -> str:
    """The problem of a file that finds other tokens most likely."""
    return (
        f"it finds the same next token most likely at {share:.1%} of the tokens, and at least "
        f"{limit:.1%} go with its limit (spec.export.qualityLimits)"
    )


def worse_than_base(perplexity: float, base: float) -> str:
    """The problem of a file that lost what the training taught."""
    return (
        f"it predicts the answers worse than the base model does (perplexity {perplexity:.4g}, and "
        f"{base:.4g} of the base model), though the tuned model predicts them better"
    )


def quality_fault(file: str, quality: Quality | None) -> str:
    """What the gate found wrong with a file, in one sentence, by what status knows."""
    if quality is None or not quality.over_limit:
        return f"{file} did not pass the checks; the manifest says why."
    return (
        f"{file}: mean KL divergence {quality.kl_divergence:.4g} nats per token, limit "
        f"{quality.max_kl_divergence:.4g}."
    )


def summary_of(verdicts: Sequence[FileVerdict], *, some_rejected: bool) -> Statement:
    """How many of the files may be used, in a sentence."""
    failed = [verdict for verdict in verdicts if not verdict.passed]
    total = f"{len(verdicts)} GGUF file{'' if len(verdicts) == 1 else 's'}"
    if failed:
        names = ", ".join(verdict.quantization.value for verdict in failed)
        where = f"; what was refused lies in {REJECTED}/" if some_rejected else ""
        tone = Tone.BAD if len(failed) == len(verdicts) else Tone.WARNING
        return Statement(tone, f"{len(failed)} of {total} not good enough: {names}{where}.")
    figures = [(each.quantization.value, each.quality) for each in verdicts]
    unsure = [kind for kind, quality in figures if quality and not quality.judged]
    if unsure:
        return Statement(
            Tone.PLAIN,
            f"{total} loaded in llama.cpp; too few held-out rows to judge {', '.join(unsure)}.",
        )
    if any(verdict.quality is None for verdict in verdicts):
        return Statement(Tone.PLAIN, f"{total} written; quality is not measured.")
    return Statement(Tone.GOOD, f"{total} passed the quality gate in llama.cpp.")


def verdict_on_merged(verdict: FileVerdict, *, rejected: bool) -> Statement:
    """Whether the merged model may be used, in a sentence."""
    word = word_for(None, verdict)
    if word is NOT_GOOD_ENOUGH:
        where = f", and lies in {REJECTED}/" if rejected else ""
        problems = "; ".join(verdict.problems)
        return Statement(Tone.BAD, f"The merged model is not good enough{where}: {problems}.")
    if word is PASSED:
        return Statement(Tone.GOOD, "The merged model passed the quality gate in transformers.")
    return Statement(word.tone, f"The merged model: {word.text}.")


def explain_failures(gate: GateReport, files: Sequence[Artifact], export: Export) -> str:
    """Which of the output's files fell short, by how much, and what to do; empty where none did."""
    names = {item.whole.rpartition("/")[2] for item in files}
    verdicts = [verdict for verdict in gate.files if verdict.file in names]
    said = [_explain_merged(gate.merged, export)] if gate.merged else []
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        problems = " ".join(f"{verdict.file}: {'; '.join(verdict.problems)}." for verdict in failed)
        number = f"{len(failed)} of {len(verdicts)} GGUF files"
        verbs = ("falls", "is") if len(failed) == 1 else ("fall", "are")
        beginning = f"{number} {verbs[0]} short and {verbs[1]} {_where(export)}."
        said.append(f"{beginning} {problems} {_remedy(failed, export)}")
    return " ".join([*filter(None, said), *gate.notices])


def _where(export: Export) -> str:
    return "published all the same" if export.verify == "warn" else f"kept apart in {REJECTED}/"


def _explain_merged(verdict: FileVerdict, export: Export) -> str:
    if verdict.passed:
        return ""
    return (
        f"The merged model falls short and is {_where(export)}: {'; '.join(verdict.problems)}. "
        "Don't serve it, and report it with manifest.json."
    )


def _remedy(failed: Sequence[FileVerdict], export: Export) -> str:
    """What helps the worst of them."""
    if not all(_only_rounded(verdict) for verdict in failed):
        return (
            "That comes from the conversion or the base model and not from rounding: don't serve "
            "such a file, and report it with manifest.json."
        )
    options = ["Take a larger type"]
    if not export.importance_matrix:
        options.append("set spec.export.importanceMatrix")
    options.append("raise its limit in spec.export.qualityLimits")
    return f"{', '.join(options[:-1])}, or {options[-1]}; only the export runs again."


def _only_rounded(verdict: FileVerdict) -> bool:
    """Whether it is a quantization with nothing wrong but its figures."""
    over = verdict.quality is not None and verdict.quality.over_limit  # all that 0.1.0 looked at
    of_figures = max(verdict.measured_problems, int(over))
    return len(verdict.problems) == of_figures and verdict.quantization not in UNQUANTIZED
