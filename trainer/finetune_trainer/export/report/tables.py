"""The rows of the tables in report and card, as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune_trainer.contract import LengthSpread, ListedRows, Training
from finetune_trainer.contract.verdict_words import Tone, word_for
from finetune_trainer.export.report import numbers
from finetune_trainer.export.report.facts import Facts, GgufFile, Point
from finetune_trainer.runtime.units import duration, size


class Row(NamedTuple):
    """A name and what belongs to it."""

    name: str
    value: str
    changed: bool = False
    """Whether a setting is not the default."""

    code: bool = False
    """Whether it is for machines."""


@dataclass(frozen=True)
class QualityRow:
    """One GGUF file in the quality table."""

    file: str
    kind: str
    size: str
    divergence: str
    limit: str
    used: float | None
    """Share of the limit that the divergence uses, up to 1; None where there is no limit."""

    same_top_token: str
    perplexity: str
    tone: Tone
    verdict: str
    problems: tuple[str, ...]


class Bar(NamedTuple):
    """One perplexity, and how long its bar is."""

    name: str
    value: str
    length: float
    """0 to 1; the largest is 1."""

    kind: str
    """`base`, `tuned` or `file`."""


def quality(facts: Facts) -> tuple[QualityRow, ...]:
    """One row for each GGUF file that was checked."""
    return tuple(_quality_row(each) for each in facts.ggufs)


def _quality_row(each: GgufFile) -> QualityRow:
    verdict, found = each.verdict, each.verdict.quality
    word = word_for(each.artifact, verdict)
    limit = found.max_kl_divergence if found else None
    used = min(found.kl_divergence / limit, 1.0) if found and limit else None
    return QualityRow(
        file=each.artifact.path if each.artifact else verdict.file,
        kind=verdict.quantization.value,
        size=size(each.artifact.bytes) if each.artifact else numbers.NOTHING,
        divergence=numbers.divergence(found.kl_divergence if found else None),
        limit=numbers.setting(limit) if limit else numbers.NOTHING,
        used=used,
        same_top_token=numbers.share(found.same_top_token if found else None),
        perplexity=numbers.perplexity(found.perplexity if found else None),
        tone=word.tone,
        verdict=word.text,
        problems=verdict.problems,
    )


def perplexities(facts: Facts) -> tuple[Bar, ...]:
    """Base, tuned and each file, all on the same tokens; the training's where no gate measured."""
    gate, change = facts.gate, facts.change
    found = [
        ("Base model", gate.base_perplexity, "base"),
        ("Tuned", gate.tuned_perplexity, "tuned"),
    ]
    found += [
        (verdict.quantization.value, verdict.quality.perplexity, "file")
        for verdict in gate.files
        if verdict.quality
    ]
    if all(value is None for _, value, _ in found) and change:
        found = [
            ("Base model", change.base_perplexity, "base"),
            ("Tuned", change.tuned_perplexity, "tuned"),
        ]
    known = [(name, value, kind) for name, value, kind in found if value is not None]
    most = max((value for _, value, _ in known if math.isfinite(value)), default=1.0)
    return tuple(
        Bar(name, numbers.perplexity(value), min(value / most, 1.0), kind)
        for name, value, kind in known
    )


def training(facts: Facts) -> tuple[Row, ...]:
    """What the training took."""
    metrics = facts.metrics
    found = [
        _row("Steps", metrics.train_steps, numbers.count),
        _row("Duration", metrics.train_runtime_seconds, duration),
        _row("Tokens trained on", metrics.train_tokens, numbers.count),
        _row("Tokens per second", metrics.tokens_per_second, numbers.count),
        _row("Trainable parameters", metrics.trainable_parameters, numbers.count),
        _row("Parameters of the base model", metrics.base_parameters, numbers.count),
        _row("Mean training loss", metrics.train_loss, numbers.loss),
        _row("Last training loss", metrics.final_loss, numbers.loss),
    ]
    return tuple(row for row in found if row)


def _row(name: str, value: float | None, write: Any) -> Row | None:
    return None if value is None else Row(name, write(value))


def dataset(facts: Facts) -> tuple[Row, ...]:
    """What `prepare` found in the data, where its report says so."""
    report = facts.dataset
    found = [
        Row("Rows in the file", numbers.count(report.rows)),
        Row("Examples trained on", numbers.count(report.examples)),
        Row("Examples held out", numbers.count(report.eval_examples)),
        Row("Rows that can't be used", numbers.count(report.invalid)),
        Row("Duplicates", numbers.count(_count(report.duplicates))),
        Row("Cut at maxSequenceLength", numbers.count(_count(report.truncated))),
        Row("Left out: no answer within it", numbers.count(_count(report.left_out))),
        Row("Tokens of an example", _spread(report.tokens)),
        Row("Tokens of an answer", _spread(report.answer_tokens)),
        Row("Tokens in all", numbers.count(report.tokens.total if report.tokens else None)),
    ]
    return tuple(row for row in found if row.value != numbers.NOTHING)


def _count(listed: ListedRows | None) -> int | None:
    return listed.count if listed else None


def _spread(found: LengthSpread | None) -> str:
    if found is None:
        return numbers.NOTHING
    median, p95, most = (numbers.count(value) for value in (found.median, found.p95, found.max))
    return f"median {median}, 95% up to {p95}, longest {most}"


MOST_EVALUATIONS = 100
"""Rows of the table of evaluations, about; the curve shows more."""


def evaluations(facts: Facts) -> tuple[Point, ...]:
    """Evaluations at even distances, with the last and the best."""
    found = facts.evaluations
    every = -(-len(found) // MOST_EVALUATIONS)
    kept = {*found[:: every or 1], *found[-1:], *([facts.best] if facts.best else [])}
    return tuple(point for point in found if point in kept)


def hyperparameters(facts: Facts) -> tuple[Row, ...]:
    """The settings as they were applied, by their names in the spec."""
    usual = dict(_flat(Training().model_dump(mode="json")))
    return tuple(
        Row(name, numbers.setting(value), changed=name in usual and usual[name] != value)
        for name, value in _flat(facts.trained.hyperparameters)
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def lineage(facts: Facts) -> tuple[Row, ...]:
    """What the files were made from."""
    made = facts.lineage
    prints = made.fingerprints
    columns = ", ".join(f"{name}: {column}" for name, column in made.columns.items())
    return (
        Row("Dataset", made.dataset),
        Row("Dataset's ETag", made.dataset_etag, code=True),
        Row("Columns", columns or numbers.NOTHING),
        Row("Base model", made.model),
        Row("Base model's revision", made.model_revision, code=True),
        Row("Fingerprint of prepare", prints.prepare, code=True),
        Row("Fingerprint of train", prints.train, code=True),
        Row("Fingerprint of export", prints.export, code=True),
        *(Row(name, version) for name, version in made.versions.items()),
    )
