"""What came out, in a few sentences: the first thing that is read of a report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from finetune_trainer.contract import REJECTED
from finetune_trainer.export.report import numbers
from finetune_trainer.export.report.facts import Facts


class Tone(StrEnum):
    """How good the news is; the page marks it with a word and a colour."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"
    PLAIN = "plain"


@dataclass(frozen=True)
class Verdict:
    """A sentence, and its tone."""

    tone: Tone
    text: str


def verdicts(facts: Facts) -> tuple[Verdict, ...]:
    """What was learnt, which files may be used, and what the training noticed."""
    return (learnt(facts), *files(facts), *noticed(facts))


def overall(facts: Facts) -> Verdict:
    """The worst of them, as a word."""
    tones = [each.tone for each in verdicts(facts)]
    if Tone.BAD in tones:
        return Verdict(Tone.BAD, "Don't use it as it is")
    if Tone.WARNING in tones:
        return Verdict(Tone.WARNING, "Usable, with warnings")
    if Tone.PLAIN in tones:
        return Verdict(Tone.PLAIN, "Not measured in full")
    return Verdict(Tone.GOOD, "Ready for use")


def learnt(facts: Facts) -> Verdict:
    """Whether the tuned model is better than its base on rows that it never saw."""
    change = facts.change
    if change is None:
        return Verdict(
            Tone.PLAIN,
            "What was learnt is not measured: there were no held-out rows "
            "(dataset.evalFraction or evalSource).",
        )
    before, after = map(numbers.perplexity, (change.base_perplexity, change.tuned_perplexity))
    if not change.better:
        return Verdict(
            Tone.BAD,
            f"Worse than its base model: perplexity on held-out answers {before} before the "
            f"training, {after} after it.",
        )
    return Verdict(
        Tone.GOOD,
        f"Better than its base model: perplexity on held-out answers fell from {before} to "
        f"{after}.",
    )


def files(facts: Facts) -> tuple[Verdict, ...]:
    """Whether the GGUF files may be used."""
    checks = facts.gate.files
    if not checks:
        return ()
    bad = [check for check in checks if not check.passed]
    total = _files(len(checks))
    if bad:
        names = ", ".join(check.quantization.value for check in bad)
        kept = any(each.artifact and each.artifact.rejected for each in facts.ggufs)
        where = f"; what was refused lies in {REJECTED}/" if kept else ""
        tone = Tone.BAD if len(bad) == len(checks) else Tone.WARNING
        return (Verdict(tone, f"{len(bad)} of {total} not good enough: {names}{where}."),)
    if any(check.quality is None for check in checks):
        return (Verdict(Tone.PLAIN, f"{total} loaded in llama.cpp; quality is not measured."),)
    return (Verdict(Tone.GOOD, f"{total} passed the quality gate in llama.cpp."),)


def noticed(facts: Facts) -> tuple[Verdict, ...]:
    """Warnings of the training, by their codes."""
    codes = dict.fromkeys(str(each.code) for each in facts.notices if each.warning)
    if not codes:
        return ()
    return (Verdict(Tone.WARNING, f"The training noticed: {', '.join(codes)}."),)


def _files(count: int) -> str:
    return f"{count} GGUF file{'' if count == 1 else 's'}"
