"""What came out, in a few sentences: the first thing that is read of a report."""

from __future__ import annotations

from finetune_trainer.contract.verdict_words import Statement, Tone, summary_of
from finetune_trainer.export.report import numbers
from finetune_trainer.export.report.facts import Facts


def verdicts(facts: Facts) -> tuple[Statement, ...]:
    """What was learnt, which files may be used, and what the training noticed."""
    return (learnt(facts), *files(facts), *noticed(facts))


def overall(facts: Facts) -> Statement:
    """The worst of them, as a word."""
    tones = [each.tone for each in verdicts(facts)]
    if Tone.BAD in tones:
        return Statement(Tone.BAD, "Don't use it as it is")
    if Tone.WARNING in tones:
        return Statement(Tone.WARNING, "Usable, with warnings")
    if Tone.PLAIN in tones:
        return Statement(Tone.PLAIN, "Not measured in full")
    return Statement(Tone.GOOD, "Ready for use")


def learnt(facts: Facts) -> Statement:
    """Whether the tuned model is better than its base on rows that it never saw."""
    change = facts.change
    if change is None:
        return Statement(
            Tone.PLAIN,
            "What was learnt is not measured: there were no held-out rows "
            "(dataset.evalFraction or evalSource).",
        )
    before, after = map(numbers.perplexity, (change.base_perplexity, change.tuned_perplexity))
    if not change.better:
        return Statement(
            Tone.BAD,
            f"Worse than its base model: perplexity on held-out answers {before} before the "
            f"training, {after} after it.",
        )
    return Statement(
        Tone.GOOD,
        f"Better than its base model: perplexity on held-out answers fell from {before} to "
        f"{after}.",
    )


def files(facts: Facts) -> tuple[Statement, ...]:
    """Whether the GGUF files may be used."""
    if not facts.gate.files:
        return ()
    rejected = any(each.artifact and each.artifact.rejected for each in facts.ggufs)
    return (summary_of(facts.gate.files, some_rejected=rejected),)


def noticed(facts: Facts) -> tuple[Statement, ...]:
    """Warnings of the training, by their codes."""
    codes = dict.fromkeys(str(each.code) for each in facts.notices if each.warning)
    if not codes:
        return ()
    return (Statement(Tone.WARNING, f"The training noticed: {', '.join(codes)}."),)
